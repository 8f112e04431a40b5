"""One token of a generation as a step that feeds itself: model, processors, choice and bookkeeping over storage that stays.

What transformers does between two calls of the model (the last token and its position, the mask, ``input_ids`` that grow, which
rows have ended) is done here on tensors of fixed size, so that a step can be replayed again without the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphs.generation.decode_step import call
from graphs.generation.processors import History, Processor

Tensor = torch.Tensor


class Choice(torch.nn.Module):
    """How a token is chosen from the scores of a step.

    Args:
        processors: in turn.
        sampled: drawn by its probability; else the one with the highest score.
        ends: ids ``[ids]`` that end a row; None where nothing does.
        padding: what follows in a row that has ended, int64 of no dimension; None where no row ends.
    """

    def __init__(self, processors: Sequence[Processor], sampled: bool, ends: Tensor | None, padding: Tensor | None) -> None:
        super().__init__()
        self.processors = torch.nn.ModuleList(processors)
        self.sampled, self.ends, self.padding = sampled, ends, padding

    def token(self, history: History, logits: Tensor) -> Tensor:
        """The next token of each row, ``[rows]``, from float32 logits ``[rows, vocabulary]``."""
        scores = logits
        for processor in self.processors:
            scores = processor(history, scores)
        if not self.sampled:
            return torch.argmax(scores, dim=-1)
        return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)


@dataclass(frozen=True)
class Begin:
    """What a generation goes on from, after the first token.

    Attributes:
        tokens: so far, ``[rows, length]`` int64.
        capacity: tokens that a row may have in the end.
        mask: which positions of the prompt to attend to, ``[rows, positions]``; None for all.
        positions: of the prompt, ``[.., positions]``; None where the model counts for itself.
        limits: what processors compare lengths with.
    """

    tokens: Tensor
    capacity: int
    mask: Tensor | None
    positions: Tensor | None
    limits: tuple[int, ...]

    @property
    def form(self) -> tuple[Any, ...]:
        """What storage for it depends on."""
        mask, positions = self.mask, self.positions
        masked = None if mask is None else (mask.dtype, mask.shape[1] - self.tokens.shape[1])
        placed = None if positions is None else (positions.dtype, positions.shape[:-1])
        return self.tokens.shape[0], self.tokens.device, self.capacity, masked, placed, len(self.limits)


class Sequences:
    """The sequences of one batch in storage of fixed size.

    Attributes:
        tokens: ``[rows, capacity]``; behind the sequence what was left there.
        last: the last token of each row ``[rows, 1]``.
        length: tokens of a sequence, int64 of no dimension. It stands still once every row has ended.
        unfinished: 1 for a row that goes on, ``[rows]`` int64.
        going: 1 while any row goes on, int64 of no dimension.
        mask: which positions to attend to, those to come included; None for all.
        positions: of the last tokens, ``[.., 1]``, or None.
    """

    def __init__(self, begin: Begin) -> None:
        tokens, mask, positions = begin.tokens, begin.mask, begin.positions
        rows = tokens.shape[0]
        self.tokens = tokens.new_zeros(rows, begin.capacity)
        self.last = tokens.new_zeros(rows, 1)
        self.length = tokens.new_zeros(())
        self.unfinished = tokens.new_ones(rows)
        self.going = tokens.new_ones(())
        self._index = torch.arange(begin.capacity, device=tokens.device)
        self._limits = tokens.new_zeros(len(begin.limits))
        width = begin.capacity if mask is None else begin.capacity + mask.shape[1] - tokens.shape[1]
        self.mask = None if mask is None else mask.new_ones(rows, width)
        self.positions = None if positions is None else positions[..., -1:].clone(memory_format=torch.contiguous_format)

    def begin(self, begin: Begin, ends: Tensor | None) -> None:
        """Hold another batch of the same form; its rows may have ended already."""
        length = begin.tokens.shape[1]
        self.tokens[:, :length] = begin.tokens
        self.last.copy_(begin.tokens[:, -1:])
        self.length.fill_(length)
        self.unfinished.fill_(1)
        if ends is not None:
            self.unfinished.copy_(~_is_one_of(begin.tokens[:, -1], ends))
        self.going.copy_(self.unfinished.max())
        if begin.limits:
            self._limits.copy_(torch.tensor(begin.limits))
        if self.mask is not None and begin.mask is not None:
            self.mask.fill_(1)
            self.mask[:, : begin.mask.shape[1]] = begin.mask
        if self.positions is not None and begin.positions is not None:
            self.positions.copy_(begin.positions[..., -1:] + 1)

    @property
    def history(self) -> History:
        """What processors look at."""
        return History(self.tokens, self.length, self._index, self._limits)

    def append(self, token: Tensor, choice: Choice) -> None:
        """Take in the next token of each row, ``[rows]``."""
        if choice.ends is not None and choice.padding is not None:
            token = token * self.unfinished + choice.padding * (1 - self.unfinished)
        self.last.copy_(token[:, None])
        self.tokens.scatter_(1, self.length.expand(token.shape[0], 1), self.last)
        self.length.add_(self.going)
        if choice.ends is not None:
            self.unfinished.mul_(~_is_one_of(token, choice.ends))
            self.going.copy_(self.unfinished.max())
        if self.positions is not None:
            self.positions.add_(1)


@dataclass(frozen=True)
class Names:
    """What the arguments of a model are called: they differ by kind of model and release of transformers."""

    cache: str
    mask: str
    positions: str


class TokenStep(torch.nn.Module):
    """The step from one token of a batch to the next.

    Args:
        model: of transformers.
        sequences: its storage.
        choice: how a token is chosen.
        names: of the model's arguments.
    """

    def __init__(self, model: torch.nn.Module, sequences: Sequences, choice: Choice, names: Names) -> None:
        super().__init__()
        self.model, self.sequences, self.choice, self.names = model, sequences, choice, names

    def inputs(self, cache: Any, others: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model's next call, as the model prepares them."""
        names, sequences = self.names, self.sequences
        given = {names.cache: cache, names.mask: sequences.mask, names.positions: sequences.positions}
        known = {name: value for name, value in given.items() if value is not None}
        model: Any = self.model
        inputs: dict[str, Any] = model.prepare_inputs_for_generation(sequences.last, next_sequence_length=1, **known, **others)
        return inputs

    def forward(self, cache: Any, **others: Any) -> None:
        """Append one token to each row."""
        outputs = call(self.model, **self.inputs(cache, others), return_dict=True)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.sequences.tokens.device)
        self.sequences.append(self.choice.token(self.sequences.history, logits), self.choice)


def _is_one_of(tokens: Tensor, ends: Tensor) -> Tensor:
    """As ``torch.isin``, which on a device asks for the numbers of different ids where there are many."""
    return (tokens[:, None] == ends).any(-1)
