"""Logits processors of transformers as parts of a step that feeds itself, or the name of the one that needs the host.

A processor is called with the tokens so far, which grow. Here they stand in storage of fixed size, `History`, and their number is
in device memory. A processor that looks at the scores alone is called as it is; of those that look at the tokens or count
them, the ones below are; every other one (the caller's own, prefixes, time stamps, guidance) leaves the loop on the host.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphs.generation.running import is_written_by

Tensor = torch.Tensor

OF_SCORES = frozenset(
    {
        *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper"),
        *("EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization"),
    }
)
"""Classes of transformers whose result depends on the scores and their own settings alone."""


@dataclass(frozen=True)
class History:
    """The tokens so far.

    Attributes:
        tokens: ``[rows, capacity]`` int64, of which the first ``length`` are tokens.
        length: int64 of no dimension.
        index: ``0 .. capacity - 1``.
        limits: numbers of tokens that processors compare with, int64 ``[limits]``.
    """

    tokens: Tensor
    length: Tensor
    index: Tensor
    limits: Tensor


class Processor(torch.nn.Module):
    """Scores ``[rows, vocabulary]`` of a step to others; a module, so that what it holds is state of the step."""

    def forward(self, history: History, scores: Tensor) -> Tensor:
        """As they are."""
        return scores


class _Theirs(Processor):
    """A processor of transformers, called with the tokens so far as they stand in their storage."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def forward(self, history: History, scores: Tensor) -> Tensor:
        scored: Tensor = self.processor(self._tokens(history), scores)
        return scored

    def _tokens(self, history: History) -> Tensor:
        return history.tokens


class _OfSet(_Theirs):
    """One that asks which tokens there are: the last one is repeated behind them."""

    def _tokens(self, history: History) -> Tensor:
        last = history.tokens.index_select(1, (history.length - 1).view(1))
        return torch.where(history.index < history.length, history.tokens, last)


class _Unrepeated(Processor):
    """As ``no_repeat_ngram_size`` asks for.

    Args:
        size: tokens in a row that are not to be repeated.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, history: History, scores: Tensor) -> Tensor:
        return _without_repeated(history, scores, self.size)


@dataclass(frozen=True)
class Prepared:
    """The processors of one call of ``generate()``.

    Attributes:
        functions: in turn.
        limits: what they compare lengths with, in this call; see `History`.
        key: what they have in common with those of another call that does the same.
    """

    functions: Sequence[Processor]
    limits: tuple[int, ...]
    key: tuple[Any, ...]


def prepare(processors: Sequence[Any]) -> Prepared | str:
    """What a recording holds of the processors; the name of one that it cannot hold."""
    functions: list[Processor] = []
    limits: list[int] = []
    keys: list[Any] = []
    for processor in processors:
        kind = type(processor)
        made = _made(processor, kind.__name__, limits) if is_theirs(processor) else None
        if made is None:
            return kind.__name__
        function, settings = made
        key = value_key(settings)
        if key is None:
            return kind.__name__
        functions.append(function)
        keys.append((kind.__name__, key))
    return Prepared(functions, tuple(limits), tuple(keys))


def is_theirs(part: Any) -> bool:
    """Whether a processor or a stopping criterion is of a class of transformers itself, and does what that class does."""
    kind = type(part)
    return kind.__module__.partition(".")[0] == "transformers" and is_written_by(kind.__call__, ("transformers", "torch"))


def value_key(value: Any) -> Any:
    """A value that is equal for equal settings; None where settings are not plain numbers, text and tensors of these."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value).__name__, value
    if type(value) is torch.Tensor:
        return "tensor", tuple(value.shape), str(value.dtype), str(value.device), tuple(value.flatten().tolist())
    if isinstance(value, dict):
        value = [item for pair in sorted(value.items(), key=lambda pair: str(pair[0])) for item in pair]
    if isinstance(value, (list, tuple)):
        parts = [value_key(part) for part in value]
        return None if None in parts else (len(parts), *parts)
    return None


def _made(processor: Any, name: str, limits: list[int]) -> tuple[Processor, Any] | None:
    """The function of a processor and its settings; what it compares lengths with is appended to ``limits``."""
    if name in OF_SCORES:
        return _Theirs(copy.deepcopy(processor)), vars(processor)
    if name == "RepetitionPenaltyLogitsProcessor" and getattr(processor, "prompt_ignore_length", None) is None:
        return _OfSet(copy.deepcopy(processor)), vars(processor)
    if name == "NoRepeatNGramLogitsProcessor":
        return _Unrepeated(processor.ngram_size), processor.ngram_size
    if name == "ForcedBOSTokenLogitsProcessor":  # of the first token, which the prompt gives
        return Processor(), None
    if name == "SuppressTokensLogitsProcessor":
        return _Marked(processor.suppress_tokens), processor.suppress_tokens
    place = len(limits)
    if name in ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"):
        limits.append(_smallest(processor))
        return _Marked(processor.eos_token_id, place, torch.lt), processor.eos_token_id
    if name == "SuppressTokensAtBeginLogitsProcessor":
        limits.append(processor.begin_index)
        return _Marked(processor.begin_suppress_tokens, place, torch.eq), processor.begin_suppress_tokens
    if name == "ForcedEOSTokenLogitsProcessor":
        limits.append(processor.max_length - 1)
        return _Marked(processor.eos_token_id, place, torch.eq, forced=True), processor.eos_token_id
    return None


class _Marked(Processor):
    """Takes tokens of the vocabulary out, or forces them.

    Args:
        tokens: their ids ``[ids]``.
        place: of the limit that the number of tokens is compared with; None for always.
        compare: how.
        forced: these tokens are the only ones that may follow.
    """

    def __init__(
        self, tokens: Tensor, place: int | None = None, compare: Callable[..., Tensor] = torch.eq, *, forced: bool = False
    ) -> None:
        super().__init__()
        self.tokens, self.place, self.compare, self.forced = tokens.clone(), place, compare, forced  # theirs may be changed

    def forward(self, history: History, scores: Tensor) -> Tensor:
        active = None if self.place is None else self.compare(history.length, history.limits[self.place])
        if self.forced:
            only = torch.where(_marked(self.tokens, scores), 0.0, torch.full_like(scores, -math.inf))
            return only if active is None else torch.where(active, only, scores)
        marked = _marked(self.tokens, scores)
        return torch.where(marked if active is None else marked & active, -math.inf, scores)


def _smallest(processor: Any) -> int:
    """The number of tokens before which a row does not end."""
    if hasattr(processor, "min_length"):
        return int(processor.min_length)
    return int(processor.prompt_length_to_skip) + int(processor.min_new_tokens)


def _marked(tokens: Tensor, scores: Tensor) -> Tensor:
    """Which entries of the vocabulary are among ``tokens``, ``[vocabulary]``; ids outside of it are none of them."""
    vocabulary = scores.shape[-1]
    ids = tokens.to(scores.device, torch.int64).flatten()
    inside = torch.where((ids < 0) | (ids > vocabulary), vocabulary, ids)
    return scores.new_zeros(vocabulary + 1, dtype=torch.bool).index_fill(0, inside, True)[:vocabulary]


def _without_repeated(history: History, scores: Tensor, size: int) -> Tensor:
    """Scores in which what would repeat ``size`` tokens in a row has none, as ``no_repeat_ngram_size`` asks for."""
    rows, capacity = history.tokens.shape
    if capacity < size:
        return scores
    ending = history.length + torch.arange(1 - size, 0, device=scores.device)
    suffix = history.tokens.index_select(1, ending.clamp(min=0))
    windows = history.tokens.unfold(1, size, 1)
    begins = history.index[: capacity - size + 1]
    alike = (windows[..., :-1] == suffix[:, None]).all(-1) & (begins + size <= history.length)
    vocabulary = scores.shape[-1]
    banned = scores.new_zeros((rows, vocabulary + 1), dtype=torch.bool)
    chosen = torch.where(alike, windows[..., -1].clamp(max=vocabulary), vocabulary)
    return scores.masked_fill(banned.scatter(1, chosen, True)[:, :vocabulary], -math.inf)
