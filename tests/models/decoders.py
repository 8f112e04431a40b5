"""Decoders of transformers at toy size, each with a cache whose tensors stay where they are. No model file is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from graphs.generation.accelerate import DecodeStep
from graphs.generation.caches.linear_cache import fixed_linear_cache
from graphs.generation.caches.own_caches import own_cache

transformers.logging.set_verbosity_error()

Tensor = torch.Tensor
CAPACITY = 64
TOKENS = 32
PROMPT = torch.tensor([[3, 7, 11, 2, 9, 8, 1, 22, 4, 5], [5, 1, 9, 44, 3, 2, 60, 61, 20, 9]])
VOCABULARY = 64
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": CAPACITY}
DENSE = {**SIZES, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
EXPERTS = {**DENSE, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16}


def static_cache(config: Any) -> Any:
    return StaticCache(config=config, max_cache_len=CAPACITY)


def minimax_cache(config: Any) -> Any:
    return fixed_linear_cache(MiniMaxCache)(config.layer_types, CAPACITY)


def deepseek_cache(config: Any) -> Any:
    return own_cache(torch.nn.Module(), DynamicCache(config=config), CAPACITY)


def recurrent_cache(config: Any) -> Any:
    """Every layer has linear attention, so the states are updated in place and nothing grows."""
    return DynamicCache(config=config)


def with_positions(position: Tensor, cache: Any) -> dict[str, Any]:
    return {"position_ids": position, "past_key_values": cache}


def recurrent(position: Tensor, cache: Any) -> dict[str, Any]:
    return {"cache_params": cache}


def with_padded_mask(position: Tensor, cache: Any) -> dict[str, Any]:
    """What ``prepare_inputs_for_generation`` makes for a static cache: a mask as long as the cache, for ALiBi."""
    mask = (torch.arange(CAPACITY, device=position.device) <= position[:, -1:]).long()
    return {"attention_mask": mask, "past_key_values": cache}


DEEPSEEK: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 16,
    "q_lora_rank": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    "sliding_window": 6,
    "partial_rotary_factor": 0.5,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_n_heads": 8,  # with fewer, scores of several entries are exactly 0, and which of them is chosen is anybody's guess
    "index_head_dim": 8,
    "index_topk": 4,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
}


@dataclass(frozen=True)
class Decoder:
    """One architecture at toy size.

    Attributes:
        name: ``model_type`` of its configuration.
        sizes: what the configuration is made with.
        cache: makes an empty cache of fixed storage.
        arguments: keyword arguments of a call besides the token ids, from positions ``[rows, tokens]`` and the cache.
        step: what is called for a token, from the model.
        routed: whether experts are chosen by data.
        eager_calls: calls of the decode that may run the model itself, because the other side of a branch is met.
    """

    name: str
    sizes: dict[str, Any] = field(hash=False)
    cache: Callable[[Any], Any] = static_cache
    arguments: Callable[[Tensor, Any], dict[str, Any]] = with_positions
    step: Callable[[Any], Any] = lambda model: model
    routed: bool = True
    eager_calls: int = 0

    def build(self, experts: str | None = None, device: torch.device | str = "cpu") -> Any:
        """The model; ``experts`` is its ``experts_implementation``. Weights are large enough for routing to vary."""
        torch.manual_seed(0)
        chosen = {} if experts is None else {"experts_implementation": experts}
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[self.name](**self.sizes), **chosen).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
        return model.to(device)


WINDOWED = {"sliding_window": 16, "head_dim": 16}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 4, "time_step_rank": 4}

DECODERS = {
    decoder.name: decoder
    for decoder in (
        Decoder("llama", DENSE, routed=False),
        Decoder("gemma2", {**DENSE, **WINDOWED}, routed=False),
        Decoder("gpt_oss", {**EXPERTS, **WINDOWED}),
        Decoder("mistral", {**DENSE, "sliding_window": None}, routed=False),
        Decoder("mixtral", {**EXPERTS, "sliding_window": None}),
        Decoder("qwen3_moe", {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        Decoder("olmoe", EXPERTS),
        Decoder("phimoe", {**EXPERTS, "sliding_window": None}),
        Decoder("qwen3_next", {**HYBRID, **LINEAR, "shared_expert_intermediate_size": 16}),
        Decoder(
            "bloom",
            {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY},
            arguments=with_padded_mask,
            routed=False,
        ),
        Decoder("jetmoe", {**EXPERTS, "kv_channels": 16, "num_key_value_heads": 2}),
        Decoder("minimax", {**HYBRID, "block_size": 8}, cache=minimax_cache),
        Decoder("mamba", MAMBA, cache=recurrent_cache, arguments=recurrent, routed=False),
        Decoder("deepseek_v4", DEEPSEEK, cache=deepseek_cache, step=DecodeStep),
    )
}
EAGER_EXPERTS = ("gpt_oss", "mixtral", "qwen3_moe", "olmoe", "phimoe", "qwen3_next", "minimax")
"""Architectures whose experts have several implementations; ``eager`` is the loop over ``nonzero``.

Not deepseek_v4: Python tells the trips of its loop apart, so it goes many ways, and to trace each takes minutes.
"""


@dataclass
class Decoded:
    """What a decode gave: tokens ``[rows, TOKENS]``, the logits of each, and the cache afterwards."""

    tokens: Tensor
    logits: list[Tensor]
    cache: Any


def decode(decoder: Decoder, model: Any, call: Any, context: Any = torch.no_grad) -> Decoded:
    """Read the prompt eagerly, then let ``call`` do `TOKENS` steps.

    Each token is the likeliest one moved on by its position: left to themselves, random weights repeat one token.
    """
    device = next(model.parameters()).device
    prompt, rows = PROMPT.to(device), PROMPT.shape[0]
    with context():
        cache = decoder.cache(model.config)
    positions = torch.arange(prompt.shape[1], device=device).expand(rows, -1)
    tokens, logits = [], []
    with context():
        last = model(prompt, use_cache=True, **decoder.arguments(positions, cache)).logits[:, -1]
        for position in range(prompt.shape[1], prompt.shape[1] + TOKENS):
            tokens.append((last.argmax(-1, keepdim=True) + position) % VOCABULARY)
            where = torch.full((rows, 1), position, device=device)
            last = call(tokens[-1], use_cache=True, **decoder.arguments(where, cache)).logits[:, -1].clone()
            logits.append(last)
    return Decoded(torch.cat(tokens, 1), logits, cache)


def tensors_of(cache: Any) -> list[Tensor]:
    """Every tensor a cache holds, in a fixed order."""
    parts = [cache, *cache.layers]
    return [leaf for part in parts for value in vars(part).values() for leaf in _tensors(value)]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return [leaf for item in items for leaf in _tensors(item)]
    return value.storage() if hasattr(value, "storage") else []
