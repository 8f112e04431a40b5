"""A cache of fixed storage whose keys end where the sequence does, for models that take the last key for the last position.

Most models are told by a mask which keys there are. Some count from the end: a local mask or a bias of positions that is cut by
the number of keys. For these a step moves what is there by one place and writes behind it, so that the storage is full of keys
from the front, which a mask hides, and of the sequence at its end. That copies the cache at each step; whether a model needs it
is tried (`graphs.generation.cache_trial`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticLayer

Tensor = torch.Tensor


class EndLayer(StaticLayer):  # type: ignore[misc]
    """Keys and values ``[rows, heads, capacity, width]`` of one layer, the last of which are those of the sequence."""

    is_croppable = False

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.begun = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the sequence: of a prompt as they are, of later tokens the whole storage."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count, begun = key_states.shape[-2], self.begun
        self.cumulative_length.add_(count)
        if not begun:
            self.begun = True
            self.keys[:, :, -count:].copy_(key_states)
            self.values[:, :, -count:].copy_(value_states)
            return key_states, value_states
        self.keys.copy_(torch.cat([self.keys[:, :, count:], key_states], 2))
        self.values.copy_(torch.cat([self.values[:, :, count:], value_states], 2))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask is made for, and where they begin: by position, which a step brings to the places of the keys."""
        return (self.max_cache_len if self.begun else query_length), 0

    def reset(self) -> None:
        """Empty it in place."""
        if self.is_initialized:
            super().reset()
        self.begun = False


class EndCache(Cache):  # type: ignore[misc]
    """The layers of a decoder.

    Args:
        layers: number of them.
        capacity: positions of the sequence.
    """

    records_prompts = False  # the host has to know whether there are keys already

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        super().__init__(layers=[EndLayer(capacity) for _ in range(layers)])

    @contextlib.contextmanager
    def decode_step(self, tokens: int, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Within it, a call of the model finds its mask where the keys are.

        Args:
            tokens: of each row.
            arguments: keyword arguments of the call.

        Yields:
            The arguments with the mask ``[rows, 1, tokens, capacity]``; as they were for a prompt.
        """
        first = self.layers[0]
        if not first.begun:
            yield arguments
            return
        given = arguments.get("attention_mask")
        given = next(iter(given.values())) if isinstance(given, dict) else given
        yield {**arguments, "attention_mask": self._mask(given, first.cumulative_length + tokens, tokens)}

    def _mask(self, given: Tensor | None, length: Tensor, tokens: int) -> Tensor:
        """What the queries see: ``given``, which counts positions from the front, moved to where their keys are."""
        keys = self.layers[0].keys
        position = torch.arange(self.capacity, device=keys.device) + (length - self.capacity)
        if given is not None and given.ndim == 4:
            moved, hidden = given.index_select(-1, position.clamp(min=0)), position < 0
            return moved & ~hidden if moved.dtype is torch.bool else moved.masked_fill(hidden, torch.finfo(moved.dtype).min)
        query = torch.arange(tokens, device=keys.device)[:, None] + (length - tokens)
        seen = ((position >= 0) & (position <= query))[None, None]
        if given is not None:
            seen = seen & (given.index_select(1, position.clamp(0, given.shape[1] - 1)) != 0)[:, None, None]
        seen = seen.expand(keys.shape[0], 1, tokens, self.capacity)
        return torch.zeros_like(seen, dtype=keys.dtype).masked_fill(~seen, torch.finfo(keys.dtype).min)
