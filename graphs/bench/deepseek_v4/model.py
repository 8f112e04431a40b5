"""Some layers of DeepSeek-V4 with random weights: as wide as V4-Flash on a GPU, narrow on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from graphs.bench.harness.optional import optional_module

LAYERS = 8
FLASH = {
    **{"hidden_size": 4096, "num_attention_heads": 64, "head_dim": 512, "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024},
    **{"n_routed_experts": 32, "moe_intermediate_size": 512},
}
NARROW = {
    **{"hidden_size": 64, "num_attention_heads": 8, "head_dim": 32, "q_lora_rank": 32, "o_groups": 4, "o_lora_rank": 16},
    **{"vocab_size": 512, "index_n_heads": 8, "index_head_dim": 16, "n_routed_experts": 8, "moe_intermediate_size": 32},
}


def build_deepseek(device: torch.device, layers: int = LAYERS) -> Any:
    """The model of transformers in bfloat16, with 32 narrow experts; it ends no sequence.

    Raises:
        MissingDependency: transformers is not installed.
    """
    transformers = optional_module("transformers")
    sizes = FLASH if device.type == "cuda" else NARROW
    config = transformers.DeepseekV4Config(num_hidden_layers=layers, max_position_embeddings=4096, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.DeepseekV4ForCausalLM(config).to(torch.bfloat16).eval()
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # a checkpoint's; without one every token would go to the first expert
            table.random_(0, config.n_routed_experts)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model
