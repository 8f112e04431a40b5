"""Logits processors of transformers as parts of a step that feeds itself, or the name of the one that needs the host.

A processor is called with the tokens so far, which grow. Here they stand in storage of fixed size, `History`, and their number is
in device memory. A processor that looks at the scores alone is called as it is; of those that look at the tokens or count
them, the ones below are; every other one (the caller's own, prefixes, time stamps, guidance) leaves the loop on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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


Processor = Callable[[History, Tensor], Tensor]


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
        ours = kind.__module__.partition(".")[0] == "transformers"
        made = _made(processor, kind.__name__, limits) if ours else None
        if made is None:
            return kind.__name__
        function, settings = made
        key = value_key(settings)
        if key is None:
            return kind.__name__
        functions.append(function)
        keys.append((kind.__name__, key))
    return Prepared(functions, tuple(limits), tuple(keys))


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
        return (lambda history, scores: processor(history.tokens, scores)), vars(processor)
    if name == "RepetitionPenaltyLogitsProcessor" and getattr(processor, "prompt_ignore_length", None) is None:
        return (lambda history, scores: processor(_filled(history), scores)), vars(processor)
    if name == "NoRepeatNGramLogitsProcessor":
        size: int = processor.ngram_size
        return (lambda history, scores: _without_repeated(history, scores, size)), size
    if name == "ForcedBOSTokenLogitsProcessor":  # of the first token, which the prompt gives
        return (lambda history, scores: scores), None
    if name == "SuppressTokensLogitsProcessor":
        never = processor.suppress_tokens
        return (lambda history, scores: _masked(scores, never)), never
    place = len(limits)
    if name in ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"):
        tokens = processor.eos_token_id
        limits.append(_smallest(processor))
        return (lambda history, scores: _masked(scores, tokens, history.length < history.limits[place])), tokens
    if name == "SuppressTokensAtBeginLogitsProcessor":
        begun = processor.begin_suppress_tokens
        limits.append(processor.begin_index)
        return (lambda history, scores: _masked(scores, begun, history.length == history.limits[place])), begun
    if name == "ForcedEOSTokenLogitsProcessor":
        ends = processor.eos_token_id
        limits.append(processor.max_length - 1)
        return (lambda history, scores: _forced(scores, ends, history.length == history.limits[place])), ends
    return None


def _smallest(processor: Any) -> int:
    """The number of tokens before which a row does not end."""
    if hasattr(processor, "min_length"):
        return int(processor.min_length)
    return int(processor.prompt_length_to_skip) + int(processor.min_new_tokens)


def _filled(history: History) -> Tensor:
    """The tokens with their last one repeated behind them: the same set."""
    last = history.tokens.index_select(1, (history.length - 1).view(1))
    return torch.where(history.index < history.length, history.tokens, last)


def _marked(tokens: Tensor, scores: Tensor) -> Tensor:
    """Which entries of the vocabulary are among ``tokens``, ``[vocabulary]``; ids outside of it are none of them."""
    vocabulary = scores.shape[-1]
    ids = tokens.to(scores.device, torch.int64).flatten()
    inside = torch.where((ids < 0) | (ids > vocabulary), vocabulary, ids)
    return scores.new_zeros(vocabulary + 1, dtype=torch.bool).index_fill(0, inside, True)[:vocabulary]


def _masked(scores: Tensor, tokens: Tensor, active: Tensor | bool = True) -> Tensor:
    return torch.where(_marked(tokens, scores) & active, -math.inf, scores)


def _forced(scores: Tensor, tokens: Tensor, active: Tensor) -> Tensor:
    forced = torch.where(_marked(tokens, scores), 0.0, torch.full_like(scores, -math.inf))
    return torch.where(active, forced, scores)


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
