"""Greedy decoding with a Hugging Face Llama: the prompt runs eagerly, every further token is one replay.

    python examples/decode_loop.py

The weights are random, so nothing is downloaded. The program decodes the same prompts twice, eagerly and captured, compares
the tokens and prints what the capture layer did. It needs ``pip install stepgraphs[hf]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import graphs

PROMPTS = ["The ferry left the harbour", "By noon the wind had turne"]  # of equal length: their bytes are the token ids
NEW_TOKENS = 24


def decode(forward: Callable[..., Any], prompts: torch.Tensor, cache: StaticCache, new_tokens: int) -> torch.Tensor:
    """Read ``prompts [batch, length]``, then take the most likely token ``new_tokens`` times; ids ``[batch, new_tokens]``.

    The cache is emptied and used again: its tensors stay where they are, so one recording serves every call.
    """
    cache.reset()
    batch, length = prompts.shape
    positions = torch.arange(length, device=prompts.device).expand(batch, -1)
    with graphs.eager():  # a prompt comes once for its length: recording it would not pay
        logits = forward(prompts, past_key_values=cache, position_ids=positions).logits
    ids = logits[:, -1:].argmax(-1)
    position = torch.full_like(ids, length)
    tokens = [ids]
    for _ in range(new_tokens - 1):
        logits = forward(ids, past_key_values=cache, position_ids=position).logits
        ids, position = logits[:, -1:].argmax(-1), position + 1
        tokens.append(ids)
    return torch.cat(tokens, dim=1)


def main() -> None:
    """Decode eagerly and captured, and compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256
    )
    model = LlamaForCausalLM(config).eval().to(device)
    cache = StaticCache(config=config, max_cache_len=64)
    prompts = torch.tensor([list(prompt.encode()) for prompt in PROMPTS], device=device)

    step = graphs.capture(model)
    with torch.no_grad():
        expected = decode(model, prompts, cache, NEW_TOKENS)
        tokens = decode(step, prompts, cache, NEW_TOKENS)
    if not torch.equal(tokens, expected):
        raise SystemExit("the tokens differ")
    print(f"{tokens.numel()} tokens on {device}, the same eager and replayed")
    print(step.report())


if __name__ == "__main__":
    main()
