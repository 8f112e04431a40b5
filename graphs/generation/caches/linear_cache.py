"""A cache of fixed storage for decoders whose linear attention hands its state to a cache class of their own, as MiniMax does.

Such a model takes no cache but one of its class, which keeps keys and values by concatenation and replaces the states.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticLayer

Tensor = torch.Tensor


@functools.cache
def fixed_linear_cache(base: Any) -> Any:
    """The class of fixed storage that stands for the cache class ``base`` of a model."""
    return type(f"Fixed{base.__name__}", (_Fixed, base), {"__doc__": _Fixed.__doc__})


class _Fixed:
    """Static layers for attention; the state of linear attention is copied into the tensor that the first call made.

    Args:
        layer_types: of the configuration; at least one is ``full_attention``.
        capacity: positions of the sequence.
    """

    is_croppable = False
    records_prompts = False  # a prompt leaves a mark on the host that there are states now
    layers: list[Any]

    def __init__(self, layer_types: list[str], capacity: int) -> None:
        Cache.__init__(self, layers=[StaticLayer(max_cache_len=capacity) for _ in layer_types])  # type: ignore[arg-type]
        self.linear_cache: list[Any] = [[] for _ in layer_types]
        self._begun = [False for _ in layer_types]
        self._attention = layer_types.index("full_attention")
        self._linear = [kind != "full_attention" for kind in layer_types]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Of a layer that has keys: a model asks about the first one, whatever its kind."""
        return self.layers[self._attention if self._linear[layer_idx] else layer_idx].get_seq_length()

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Keep a state ``[rows, heads, width, width]``."""
        state = self.linear_cache[layer_idx]
        if isinstance(state, Tensor):
            state.copy_(linear_cache)
        else:
            self.linear_cache[layer_idx] = linear_cache.clone()
        self._begun[layer_idx] = True

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """The state, or None before the first call."""
        return self.linear_cache[layer_idx] if self._begun[layer_idx] else None

    def reset(self) -> None:
        """Empty it in place."""
        for layer in self.layers:
            layer.reset()
        self._begun = [False for _ in self._begun]
