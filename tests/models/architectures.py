"""Language models of transformers at toy size, as unlike each other as possible; their weights are random and large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from tests.models.decoders import VOCABULARY

transformers.logging.set_verbosity_error()

Tensor = torch.Tensor
WIDTH, INNER, LAYERS, HEADS, POSITIONS = 32, 48, 2, 4, 128
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "router_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), WIDTH // HEADS),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "attention_window_size"), 16),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_mamba_heads": 4, "mamba_d_ssm": 64},
    **{"mamba_dt_rank": 4, "time_step_rank": 4, "n_groups": 1, "mamba_chunk_size": 8, "chunk_size": 8},
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "rotary_dim": 4, "use_cache": True},
}
"""Sizes under all the names that configurations have for them; one that has no such name takes no notice."""
BOTH_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 10}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
LATENT = {"num_key_value_heads": HEADS}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}


def prompt(turn: int, rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(turn))


def text(turn: int) -> dict[str, Any]:
    return {"input_ids": prompt(turn)}


def speech(turn: int) -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(turn))}


def patches(turn: int) -> dict[str, Any]:
    """An image of four patches before the text, in the place of as many tokens."""
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(turn))
    return {"input_ids": torch.cat([torch.full((2, 4), 63), prompt(turn)], 1), "pixel_values": pixels}


def patches_with_types(turn: int) -> dict[str, Any]:
    given = patches(turn)
    return {**given, "token_type_ids": torch.zeros_like(given["input_ids"])}


def merged_patches(turn: int) -> dict[str, Any]:
    """An image of four patches that become one token, and positions in time, height and width."""
    pixels = torch.randn(8, 96, generator=torch.Generator().manual_seed(turn))
    ids = torch.cat([torch.tensor([[62, 63]] * 2), prompt(turn)], 1)
    grid = torch.tensor([[1, 2, 2]] * 2)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 63).int()}


@dataclass(frozen=True)
class Architecture:
    """One architecture at toy size.

    Attributes:
        name: ``model_type`` of its configuration.
        sizes: what its configuration is made with besides `SIZES`.
        auto: makes the model of a configuration.
        inputs: arguments of ``generate`` for the prompt of a number.
        without: names of `SIZES` that its configuration does not take.
    """

    name: str
    sizes: dict[str, Any] = field(default_factory=dict, hash=False)
    auto: Any = AutoModelForCausalLM
    inputs: Callable[[int], dict[str, Any]] = text
    without: tuple[str, ...] = ()

    def build(self) -> Any:
        """The model, always the same."""
        sizes = {name: size for name, size in SIZES.items() if name not in self.without}
        torch.manual_seed(0)
        model = self.auto.from_config(CONFIG_MAPPING[self.name](**{**sizes, **self.sizes})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
        return model


def _plain(names: str, sizes: dict[str, Any] | None = None, **options: Any) -> tuple[Architecture, ...]:
    return tuple(Architecture(name, sizes or {}, **options) for name in names.split())


_VISION = {
    **{"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 2},
    "projection_dim": WIDTH,
}
_IMAGE = {**_VISION, "image_size": 8, "patch_size": 4}
_PATCHES = {"depth": 1, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_NO_SUPPRESSION = {"begin_suppress_tokens": None, "suppress_tokens": None}

TEXT = (
    # rotary positions, one kind of attention
    *_plain("llama qwen2 qwen3 phi phi3 persimmon stablelm olmo olmo2 smollm3 glm glm4 nemotron helium diffllama bitnet arcee"),
    *_plain(
        "apertus granite hunyuan_v1_dense ernie4_5 exaone seed_oss jais2 nanochat internlm3 iquestcoder gpt_neox gemma cohere"
    ),
    *_plain("gptj codegen hyperclovax ministral3 gpt_neox_japanese flint"),
    Architecture("hrm_text", {"prefix_lm": True}),
    # learned, sinusoidal or no positions, ALiBi
    *_plain("gpt2 opt gpt_bigcode biogpt xglm ctrl bloom openai-gpt mpt cpmant"),
    Architecture("falcon", without=("head_dim",)),
    Architecture("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 6, "num_layers": LAYERS}),
    # sliding windows, some that prompts and what follows outgrow
    *_plain("gemma2 gemma3_text cohere2 gpt_oss olmo3 exaone4 afmoe granite_swa cwm vaultgemma modernbert-decoder", BOTH_WINDOWS),
    *_plain("mistral starcoder2 ministral", {"sliding_window": 10}),
    *_plain("beam dory kolibri1 laguna mimo_v2_flash"),
    *_plain("gemma4_text gemma4_unified_text", {**PER_LAYER, **BOTH_WINDOWS, "sliding_window": 64}),
    Architecture(
        "gemma3n_text",
        {
            **PER_LAYER,
            **BOTH_WINDOWS,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": None,
        },
    ),
    # experts
    *_plain(
        "mixtral qwen2_moe qwen3_moe olmoe flex_olmo phimoe granitemoe granitemoeshared granitemoe_swa ernie4_5_moe glm4_moe"
    ),
    *_plain("hunyuan_v1_moe llama4_text jetmoe dots1 minimax_m2 minimax_m3_vl_text solar_open hy_v3 aria_text exaone_moe mellum"),
    *_plain("cohere2_moe doge sarvam_moe"),
    Architecture(
        "dbrx",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
        },
    ),
    # latent attention, some with an index of keys
    *_plain("deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa youtu minicpm3 sarvam_mla axk1 axk2", LATENT),
    *_plain("hy_v4 dots3_note_text", LATENT),
    # recurrent states, alone and beside attention
    *_plain("mamba falcon_mamba rwkv"),
    Architecture("mamba2", {"head_dim": 16}),
    Architecture("xlstm", {"hidden_size": 64, "qk_dim_factor": 1.0}, without=("v_head_dim",)),
    *_plain("qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid", LINEAR),
    Architecture("bailing_hybrid", {**LINEAR, **LATENT}),
    *_plain("lfm2 lfm2_moe", CONVOLUTION),
    *_plain("falcon_h1 lfm3 lara_mini inkling_text"),
    Architecture("bamba", {"attn_layer_indices": [1]}),
    Architecture("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    Architecture("zamba2", {"layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4, **LATENT}),
    Architecture("granitemoehybrid", {"layer_types": ["mamba", "attention"]}),
    Architecture(
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "num_hidden_layers": 3,
            "use_mamba_kernels": False,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    Architecture("recurrent_gemma", {"block_types": ["recurrent", "attention"]}),
)
_SIZES_OF_T5 = {"d_kv": WIDTH // HEADS, "decoder_start_token_id": 0}
OTHERS = (
    *_plain("t5 umt5 longt5", _SIZES_OF_T5, auto=AutoModelForSeq2SeqLM, without=("head_dim", "intermediate_size")),
    *_plain(
        "bart mbart pegasus marian blenderbot blenderbot-small m2m_100 plbart mvp pegasus_x",
        {"decoder_start_token_id": 2, "forced_eos_token_id": None},
        auto=AutoModelForSeq2SeqLM,
    ),
    Architecture(
        "whisper",
        {
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "decoder_start_token_id": 2,
            **_NO_SUPPRESSION,
        },
        AutoModelForSpeechSeq2Seq,
        speech,
    ),
    Architecture(
        "llava",
        {
            "vision_config": {"model_type": "clip_vision_model", **_IMAGE},
            "text_config": {"model_type": "llama", **SIZES},
            "image_token_id": 63,
            "vision_feature_layer": -1,
        },
        AutoModelForImageTextToText,
        patches,
    ),
    Architecture(
        "paligemma",
        {
            "vision_config": {"model_type": "siglip_vision_model", **_IMAGE},
            "text_config": {"model_type": "gemma", **SIZES},
            "projection_dim": WIDTH,
            "image_token_id": 63,
        },
        AutoModelForImageTextToText,
        patches_with_types,
    ),
    Architecture(
        "qwen2_vl",
        {
            "vision_config": _PATCHES,
            "text_config": {**SIZES, "rope_parameters": _SECTIONS},
            "image_token_id": 63,
            "vision_start_token_id": 62,
        },
        AutoModelForImageTextToText,
        merged_patches,
    ),
)
ARCHITECTURES = {architecture.name: architecture for architecture in (*TEXT, *OTHERS)}
