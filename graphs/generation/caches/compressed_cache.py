"""A cache of fixed storage for decoders that attend to a sliding window and to compressed entries, as DeepSeek-V4 does.

Such a decoder keeps the last keys of each layer, the tokens of the window that is open (a window takes ``rate`` tokens), and one
entry per window that was closed. The cache of transformers cuts and concatenates all three, so that no two steps look alike.
Here they have fixed storage, and a decode step does the same whether it closes a window or not: the open window is compressed
with what it holds so far, the entry is written where the closed window's will be, and masks hide it until then.

A call that is not told to be such a step (`CompressedCache.decode_step`), a prompt first of all, is shown the lengths that the
cache of transformers would show, for which the host has to know how many tokens there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

Tensor = torch.Tensor


@dataclass(frozen=True)
class LayerKind:
    """What a layer keeps.

    Attributes:
        rate: tokens per compressed entry; 0 for a layer of the window alone.
        chosen: whether the layer tells which entries a query sees; else it sees all of them.
    """

    rate: int = 0
    chosen: bool = False


@dataclass(frozen=True)
class _Open:
    """Where a decode step is in the window that it belongs to; all but ``first`` are of shape ``[1]``.

    Attributes:
        slot: of the token within its window.
        entry: of the window among all of them.
        side, other: where overlapping windows keep what the next one reads of this one, and of the one before.
        first: position of the first token, 0-dim.
    """

    slot: Tensor
    entry: Tensor
    side: Tensor
    other: Tensor
    first: Tensor


@dataclass
class _Step:
    """A decode step.

    Attributes:
        slot: of its key in the ring of the sliding window, ``[1]``.
        open: its windows by their rate.
        mask: what is added to the scores, ``[rows, 1, 1, window + entries]``.
        entries: the last columns of ``mask`` for a layer that sees all of its entries, and for one that has none there.
        shown: which of the two they hold.
    """

    slot: Tensor
    open: dict[int, _Open]
    mask: Tensor
    entries: tuple[Tensor, Tensor]
    shown: bool = False

    def show(self, entries: bool) -> None:
        """Set the last columns for the layer that runs: the model has one mask for all of them."""
        columns = self.entries[0].shape[0]
        if columns and entries != self.shown:
            self.mask[..., -columns:] = self.entries[0] if entries else self.entries[1]
            self.shown = entries


class _Clock:
    """How many tokens the layers of a cache have seen.

    Attributes:
        count: on the device, 0-dim; None before the first call. It includes the tokens of a call from its first layer on, but
            those of a decode step only after it.
        begun: whether there are any.
        before: tokens before the call that runs, unless it is a decode step.
        step: the decode step that runs.
    """

    def __init__(self) -> None:
        self.count: Tensor | None = None
        self.begun = False
        self.before = 0
        self.step: _Step | None = None

    def tokens(self) -> int:
        """The tokens, waiting for the device."""
        return int(self.count) if self.begun and self.count is not None else 0

    def begin(self, tokens: int, capacity: int, device: torch.device) -> None:
        """The first layer gets to see ``tokens`` more."""
        self.before = self.tokens()
        if self.before + tokens > capacity:
            raise ValueError(f"the cache has {capacity} positions, not {self.before + tokens}")
        if self.count is None:
            self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.count.add_(tokens)
        self.begun = True

    def reset(self) -> None:
        self.begun = False
        if self.count is not None:
            self.count.zero_()


class _Series:
    """One series of compressed entries of a layer.

    Attributes:
        tokens, gates: of the open window, ``[rows, rate, width]``.
        entries: ``[rows, windows, features]``.
        last_tokens, last_gates: of the last two windows, what the next one reads of them, ``[rows, 2, rate, features]``.
    """

    def __init__(self, kv: Tensor, gate: Tensor, rate: int) -> None:
        rows, _, width = kv.shape
        self.tokens, self.gates = kv.new_zeros(rows, rate, width), gate.new_zeros(rows, rate, width)
        self.entries: Tensor | None = None
        self.last_tokens: Tensor | None = None
        self.last_gates: Tensor | None = None

    def made_for(self, features: int, windows: int, overlaps: bool) -> _Series:
        """With storage for entries; gates are kept with their bias, whose dtype may be wider."""
        if self.entries is None:
            rows, rate, _ = self.tokens.shape
            self.entries = self.tokens.new_zeros(rows, windows, features)
            if overlaps:
                wide = torch.promote_types(self.gates.dtype, torch.float32)
                self.last_tokens = self.tokens.new_zeros(rows, 2, rate, features)
                self.last_gates = self.gates.new_full((rows, 2, rate, features), float("-inf"), dtype=wide)
        return self

    def storage(self) -> list[Tensor]:
        """All of it, rows first."""
        parts = self.tokens, self.gates, self.entries, self.last_tokens, self.last_gates
        return [part for part in parts if part is not None]


class CompressedLayer(CacheLayerMixin):
    """One layer, with the methods that the attention and the compressors of the model call.

    Args:
        kind: what it keeps.
        window: keys that a query sees in the sliding window, itself included.
        capacity: positions of the sequence.
        spare: columns of a step's mask that belong to the entries of other layers.
        clock: of the cache; ``leads`` says that this layer is the one that advances it.
    """

    is_sliding = True
    is_compileable = True

    def __init__(self, kind: LayerKind, window: int, capacity: int, spare: int, clock: _Clock, leads: bool) -> None:
        super().__init__()
        self.kind, self.capacity, self.spare = kind, capacity, spare
        self.window = min(window, capacity)
        self.clock, self.leads = clock, leads
        self.series: dict[str, _Series] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The ring of the window, ``[rows, heads, window + spare, width]``; keys are values."""
        rows, heads, _, width = key_states.shape
        self.batch_size = rows
        self.keys = self.values = key_states.new_zeros(rows, heads, self.window + self.spare, width)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep keys ``[rows, heads, tokens, width]``; returns those that the mask of the call is about."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.clock.step
        if step is not None:
            step.show(entries=self.kind.rate > 0 and not self.kind.chosen)
            self.keys.index_copy_(2, step.slot, key_states)
            return self.keys, self.keys
        tokens = key_states.shape[2]
        if self.leads:
            self.clock.begin(tokens, self.capacity, key_states.device)
        full = self._with_past(key_states)
        at = torch.arange(self.clock.before, self.clock.before + tokens, device=key_states.device)[-self.window :]
        self.keys.index_copy_(2, at % self.window, key_states[:, :, -self.window :])
        return full, full

    def _with_past(self, key_states: Tensor) -> Tensor:
        """The keys of a call behind those that are still in the window; a single one stands among `capacity` positions."""
        before, tokens = self.clock.before, key_states.shape[2]
        at = torch.arange(max(before - self.window + 1, 0), before, device=key_states.device)
        past = self.keys.index_select(2, at % self.window)
        if tokens > 1:
            return torch.cat([past, key_states], dim=2)
        rows, heads, _, width = key_states.shape
        full = key_states.new_zeros(rows, heads, self.capacity, width).index_copy_(2, at, past)
        full[:, :, before : before + 1] = key_states
        return full

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Tokens and gates ``[rows, tokens, width]`` to be compressed now, and the position of the first of them."""
        rate, step = self.kind.rate, self.clock.step
        if name not in self.series:
            self.series[name] = _Series(kv, gate, rate)
        series = self.series[name]
        if step is not None:
            series.tokens.index_copy_(1, step.open[rate].slot, kv)
            series.gates.index_copy_(1, step.open[rate].slot, gate)
            return series.tokens, series.gates, step.open[rate].first
        left = self.clock.before % rate
        kv, gate = torch.cat([series.tokens[:, :left], kv], dim=1), torch.cat([series.gates[:, :left], gate], dim=1)
        usable = kv.shape[1] // rate * rate
        series.tokens[:, : kv.shape[1] - usable] = kv[:, usable:]
        series.gates[:, : kv.shape[1] - usable] = gate[:, usable:]
        return kv[:, :usable], gate[:, :usable], self.clock.before - left

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        """Keep entries ``[rows, windows, features]`` that were compressed; returns all of them."""
        entries = self._series(name, compressed.shape[-1]).entries
        assert entries is not None
        if self.clock.step is not None:
            return entries.index_copy_(1, self.clock.step.open[self.kind.rate].entry, compressed)
        first = self.clock.before // self.kind.rate
        end = first + compressed.shape[1]
        entries[:, first:end] = compressed
        return entries[:, :end]

    def update_overlap_state(
        self, name: str, chunk_kv: Tensor, chunk_gate: Tensor, head_dim: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keep what the next window reads of the last one of ``[rows, windows, rate, width]``; returns what this call reads."""
        series, step, rate = self._series(name, head_dim), self.clock.step, self.kind.rate
        assert series.last_tokens is not None and series.last_gates is not None
        kept = series.last_tokens, series.last_gates
        last = chunk_kv[:, -1:, :, :head_dim], chunk_gate[:, -1:, :, :head_dim]
        if step is not None:
            for storage, new in zip(kept, last, strict=True):
                storage.index_copy_(1, step.open[rate].side, new.to(storage.dtype))
            tokens, gates = (storage.index_select(1, step.open[rate].other)[:, 0] for storage in kept)
            return tokens, gates
        first = self.clock.before // rate
        prior = [storage[:, (first - 1) % 2].clone() for storage in kept] if first else [None, None]
        for storage, new in zip(kept, last, strict=True):
            storage[:, (first + chunk_kv.shape[1] - 1) % 2] = new[:, 0].to(storage.dtype)
        return prior[0], prior[1]

    def _series(self, name: str, features: int) -> _Series:
        windows = -(-self.capacity // self.kind.rate)
        return self.series[name].made_for(features, windows, self.kind.chosen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` returns; a single query has a mask over all positions."""
        if query_length == 1:
            return self.capacity, 0
        before = self.clock.tokens()
        past = min(before, self.window - 1)
        return past + query_length, before - past

    def get_seq_length(self) -> Any:
        """Tokens that were seen: a 0-dim tensor once there are any."""
        return self.clock.count if self.clock.begun else 0

    def get_max_length(self) -> int:
        """Positions of the sequence."""
        return self.capacity

    def reset(self) -> None:
        """Empty it in place."""
        for part in self._storage():
            part.zero_()
        for series in self.series.values():
            if series.last_gates is not None:
                series.last_gates.fill_(float("-inf"))
        self.clock.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from the row that ``beam_idx`` names, in place."""
        for part in self._storage():
            part.copy_(part.index_select(0, beam_idx.to(part.device)))

    def _storage(self) -> list[Tensor]:
        keys = [self.keys] if self.keys is not None else []
        return keys + [part for series in self.series.values() for part in series.storage()]


class CompressedCache(Cache):
    """The layers of a decoder.

    Args:
        kinds: what each layer keeps.
        window: keys that a query sees in the sliding window, itself included.
        capacity: positions of the sequence.
    """

    reorders_in_place = True
    records_prompts = False  # the host has to know the lengths of what a prompt is shown

    def __init__(self, kinds: list[LayerKind], window: int, capacity: int) -> None:
        self._seen_whole = max((kind.rate for kind in kinds if kind.rate and not kind.chosen), default=0)
        self._entries = -(-capacity // self._seen_whole) if self._seen_whole else 0
        self._clock, self._window = _Clock(), min(window, capacity)
        self._rates = sorted({kind.rate for kind in kinds if kind.rate})
        self.capacity = capacity
        super().__init__(
            layers=[
                CompressedLayer(kind, window, capacity, self._spare(kind), self._clock, leads=index == 0)
                for index, kind in enumerate(kinds)
            ]
        )

    def _spare(self, kind: LayerKind) -> int:
        """A step has one mask for all layers, and its last columns are for the entries of those that see all of theirs."""
        return 0 if kind.rate and not kind.chosen else self._entries

    @contextlib.contextmanager
    def decode_step(self, tokens: int, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Within it, a call of the model for one token per row does what any other such call does.

        Args:
            tokens: of each row.
            arguments: keyword arguments of the call.

        Yields:
            The arguments with a mask that goes with it; as they were, where the call is another one, or has a mask of its own.
        """
        given = arguments.get("attention_mask")
        given = next(iter(given.values())) if isinstance(given, dict) else given
        count = self._clock.count
        if not self._clock.begun or count is None or tokens != 1 or not self._fits(given):
            yield arguments
            return
        self._clock.step = step = self._step(given, count)
        try:
            yield {**arguments, "attention_mask": {"sliding_attention": step.mask}}
        finally:
            self._clock.step = None
        count.add_(1)

    def _fits(self, mask: Any) -> bool:
        return mask is None or (mask.is_floating_point() and mask.ndim == 4 and mask.shape[2:] == (1, self.capacity))

    def _step(self, given: Tensor | None, count: Tensor) -> _Step:
        index = count.reshape(1)
        windows = {}
        for rate in self._rates:
            entry = index // rate
            side = entry % 2
            windows[rate] = _Open(index % rate, entry, side, 1 - side, entry[0] * rate)
        mask = self._mask(given, count)
        hidden = mask.new_full((self._entries,), torch.finfo(mask.dtype).min)
        later = torch.arange(self._entries, device=count.device) >= (count + 1) // max(self._seen_whole, 1)
        shown = torch.where(later, hidden, torch.zeros_like(hidden))
        return _Step(index % self._window, windows, mask, (shown, hidden))

    def _mask(self, given: Tensor | None, count: Tensor) -> Tensor:
        """What a query sees, with no entries yet.

        The ring holds the last positions in another order, and slots that were not written hold none of them.
        """
        keys = self.layers[0].keys
        dtype = (keys if given is None else given).dtype
        position = count - (count - torch.arange(self._window, device=count.device)) % self._window
        if given is None:
            given = keys.new_zeros(keys.shape[0], 1, 1, self.capacity)
        lowest = torch.finfo(dtype).min
        mask = given.index_select(-1, position.clamp(min=0)).masked_fill(position < 0, lowest)
        return torch.nn.functional.pad(mask, (0, self._entries), value=lowest)
