"""Caches of fixed storage for the two architectures of transformers whose own caches are replaced or grow at each step.

The models' files are not changed: they are handed another cache object with the methods they call.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer
from transformers.models.minimax.modeling_minimax import MiniMaxCache

Tensor = torch.Tensor
CAPACITY = 64


class StaticMiniMaxCache(MiniMaxCache):
    """Static layers for attention; the state of linear attention is copied into the tensor it was first given."""

    def __init__(self, layer_types: list[str]) -> None:
        Cache.__init__(self, layers=[StaticLayer(CAPACITY) for _ in layer_types])
        self.linear_cache: list[Any] = [[] for _ in layer_types]
        self.attention = layer_types.index("full_attention")

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Of a layer that has keys: the model asks about the first one, whatever its kind."""
        return super().get_seq_length(self.attention)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        if isinstance(self.linear_cache[layer_idx], Tensor):
            self.linear_cache[layer_idx].copy_(linear_cache)
        else:
            self.linear_cache[layer_idx] = linear_cache.clone()

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        state = self.linear_cache[layer_idx]
        return state if isinstance(state, Tensor) else None


def static_minimax_cache(config: Any) -> StaticMiniMaxCache:
    return StaticMiniMaxCache(config.layer_types)


class _Filled:
    """A buffer ``[rows, capacity, width]`` and, on its device, how many of its entries are filled."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        self.values = like.new_zeros(like.shape[0], capacity, like.shape[2])
        self.count = torch.zeros((), dtype=torch.int64, device=like.device)

    def filled(self) -> Tensor:
        return self.values[:, : int(self.count)]

    def replace(self, entries: Tensor) -> None:
        self.values[:, : entries.shape[1]] = entries
        self.count.fill_(entries.shape[1])

    def append(self, entries: Tensor) -> None:
        start = int(self.count)
        self.values[:, start : start + entries.shape[1]] = entries
        self.count.add_(entries.shape[1])


class BoundedCompressedLayer(CacheLayerMixin):
    """The cache layer of DeepSeek-V4 with the growing tensors held in buffers of fixed size and counted on the device.

    What the model gets to see has the lengths that it would have with the library's own cache.

    Args:
        window: keys that a query sees in the sliding window, itself included.
        rate: tokens per compressed entry; 0 for a layer that only has the window.
    """

    is_sliding = True
    is_compileable = False

    def __init__(self, window: int, rate: int) -> None:
        super().__init__()
        self.window, self.rate = window, rate
        self.tokens: dict[str, _Filled] = {}
        self.gates: dict[str, _Filled] = {}
        self.entries: dict[str, _Filled] = {}
        self.overlap: dict[str, tuple[Tensor, Tensor]] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, tokens, width = key_states.shape
        if tokens < self.window - 1:
            raise ValueError(f"the first call must fill the window: {self.window - 1} tokens, not {tokens}")
        self.keys = self.values = key_states.new_zeros(rows, heads, self.window - 1, width)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            full = key_states
        else:
            full = torch.cat([self.keys, key_states], dim=-2)
        self.keys.copy_(full[:, :, -self.window + 1 :])
        return full, full

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        """Tokens that close windows, their gates, and the position of the first of them."""
        if name not in self.tokens:
            self.tokens[name], self.gates[name] = _Filled(kv, self.rate), _Filled(gate, self.rate)
        first = int(self.entries[name].count) * self.rate if name in self.entries else 0
        kv = torch.cat([self.tokens[name].filled(), kv], dim=1)
        gate = torch.cat([self.gates[name].filled(), gate], dim=1)
        usable = kv.shape[1] // self.rate * self.rate
        self.tokens[name].replace(kv[:, usable:])
        self.gates[name].replace(gate[:, usable:])
        return kv[:, :usable], gate[:, :usable], first

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        if name not in self.entries:
            self.entries[name] = _Filled(compressed, CAPACITY // self.rate)
        self.entries[name].append(compressed)
        return self.entries[name].filled()

    def update_overlap_state(
        self, name: str, chunk_kv: Tensor, chunk_gate: Tensor, head_dim: int
    ) -> tuple[Tensor | None, Tensor | None]:
        last = chunk_kv[:, -1, :, :head_dim], chunk_gate[:, -1, :, :head_dim]
        if name not in self.overlap:
            self.overlap[name] = last[0].clone(), last[1].clone()
            return None, None
        prior = self.overlap[name][0].clone(), self.overlap[name][1].clone()
        for kept, new in zip(self.overlap[name], last, strict=True):
            kept.copy_(new)
        return prior

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length if not self.is_initialized else self.window - 1 + query_length, 0

    def get_seq_length(self) -> int:
        return 0  # asked for while the prompt's mask is built; a step is given its positions and its mask

    def get_max_length(self) -> int:
        return CAPACITY


def bounded_deepseek_cache(config: Any) -> Cache:
    rates = [config.compress_rates.get(kind, 0) for kind in config.layer_types]
    return Cache(layers=[BoundedCompressedLayer(config.sliding_window, rate) for rate in rates])
