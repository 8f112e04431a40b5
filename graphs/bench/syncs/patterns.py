"""Three decode steps that make the host wait, each beside the version that somebody wrote by hand so that it does not.

Both versions hold the same weights and caches and are called with the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class SyncSizes:
    """Sizes of the three steps.

    Attributes:
        rows: sequences of a batch, or tokens that are routed.
        heads, width, capacity: heads of keys, their width, and positions of the cache.
        hidden, inner, experts, chosen: widths and number of the experts, and how many serve a token.
        vocabulary, kept: logits of a row, and the largest of them that are looked at.
        dtype: of weights and activations.
    """

    rows: int
    heads: int
    width: int
    capacity: int
    hidden: int
    inner: int
    experts: int
    chosen: int
    vocabulary: int
    kept: int
    dtype: torch.dtype


DECODE = SyncSizes(16, 8, 128, 8192, 7168, 2048, 8, 2, 128256, 64, torch.bfloat16)
TOY_SYNCS = SyncSizes(2, 2, 16, 64, 32, 48, 4, 2, 256, 8, torch.float32)


class RingAttention(torch.nn.Module):
    """A cache row written at a position that the host reads, and attention over as many rows as are filled."""

    keys: Tensor
    values: Tensor

    def __init__(self, sizes: SyncSizes) -> None:
        super().__init__()
        shape = (sizes.rows, sizes.heads, sizes.capacity, sizes.width)
        self.capacity, self.scale = sizes.capacity, sizes.width**-0.5
        self.register_buffer("keys", torch.zeros(shape, dtype=sizes.dtype))
        self.register_buffer("values", torch.zeros(shape, dtype=sizes.dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        """``q, k, v [rows, heads, width]``, ``position []``; returns ``[rows, heads, width]``."""
        start = int(position)
        self.keys[:, :, start] = k
        self.values[:, :, start] = v
        scores = (q[:, :, None] * self.scale) @ self.keys[:, :, : start + 1].transpose(2, 3)
        return (scores.softmax(-1) @ self.values[:, :, : start + 1])[:, :, 0]


class RingAttentionByHand(RingAttention):
    """The same over the whole cache, with a mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        """See `RingAttention`."""
        self.keys.index_copy_(2, position[None], k[:, :, None])
        self.values.index_copy_(2, position[None], v[:, :, None])
        scores = (q[:, :, None] * self.scale) @ self.keys.transpose(2, 3)
        empty = torch.arange(self.capacity, device=q.device) > position
        return (scores.masked_fill(empty, float("-inf")).softmax(-1) @ self.values)[:, :, 0]


class ExpertLoop(torch.nn.Module):
    """Tokens sorted by expert, and a loop over the experts with the number of tokens of each on the host."""

    def __init__(self, sizes: SyncSizes) -> None:
        super().__init__()
        self.experts, self.chosen = sizes.experts, sizes.chosen
        self.up = torch.nn.Parameter(torch.randn(sizes.experts, 2 * sizes.inner, sizes.hidden, dtype=sizes.dtype) * 0.02)
        self.down = torch.nn.Parameter(torch.randn(sizes.experts, sizes.hidden, sizes.inner, dtype=sizes.dtype) * 0.02)

    def expert(self, index: int, x: Tensor) -> Tensor:
        """The output of one expert for ``x [n, hidden]``."""
        gate, up = F.linear(x, self.up[index]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down[index])

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        """``x [rows, hidden]``, ``scores [rows, experts]``; returns ``[rows, hidden]``."""
        weights, chosen = scores.softmax(-1).topk(self.chosen)
        out = torch.zeros_like(x)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.experts).tolist()
        start = 0
        for index, count in enumerate(counts):
            places = order[start : start + count]
            tokens = places // self.chosen
            out.index_add_(0, tokens, self.expert(index, x[tokens]) * weights.flatten()[places, None])
            start += count
        return out


class ExpertLoopByHand(ExpertLoop):
    """Every expert over every token, weighted by zero where it was not chosen."""

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        """See `ExpertLoop`."""
        weights, chosen = scores.softmax(-1).topk(self.chosen)
        shares = torch.zeros_like(scores).scatter_(1, chosen, weights)
        out = torch.zeros_like(x)
        for index in range(self.experts):
            out += self.expert(index, x) * shares[:, index, None]
        return out


class ThresholdSampling(torch.nn.Module):
    """The largest logits above a threshold, both temperature and threshold on the host."""

    def __init__(self, sizes: SyncSizes) -> None:
        super().__init__()
        self.kept = sizes.kept

    def forward(self, logits: Tensor, temperature: Tensor, floor: Tensor, noise: Tensor) -> Tensor:
        """``logits [vocabulary]``, ``temperature [], floor []``, ``noise [kept]``; returns a token ``[]``."""
        values, places = (logits.float() / temperature.item()).topk(self.kept)
        shares = values.softmax(-1)
        allowed = shares > min(floor.item(), 0.01)
        tokens, shares = places[allowed], shares[allowed]
        return tokens[(shares / shares.sum() / noise[: len(shares)]).argmax()]


class ThresholdSamplingByHand(ThresholdSampling):
    """The same with what is below the threshold left in place, and never chosen."""

    def forward(self, logits: Tensor, temperature: Tensor, floor: Tensor, noise: Tensor) -> Tensor:
        """See `ThresholdSampling`; the allowed shares are the first, since they come in descending order."""
        values, places = (logits.float() / temperature).topk(self.kept)
        shares = values.softmax(-1)
        shares = torch.where(shares > floor.clamp(max=0.01), shares, 0.0)
        return places.index_select(0, (shares / shares.sum() / noise).argmax(0, keepdim=True)).squeeze(0)


@dataclass(frozen=True)
class Pattern:
    """A step as it was written, the one written by hand, and the arguments of the ``i``-th call."""

    name: str
    written: Callable[[SyncSizes], torch.nn.Module]
    by_hand: Callable[[SyncSizes], torch.nn.Module]
    arguments: Callable[[SyncSizes, torch.Generator, int], tuple[Tensor, ...]]


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def _attention_arguments(sizes: SyncSizes, generator: torch.Generator, call: int) -> tuple[Tensor, ...]:
    q, k, v = (_normal(generator, sizes.rows, sizes.heads, sizes.width, dtype=sizes.dtype) for _ in range(3))
    position = (sizes.capacity * 3 // 4 + call) % sizes.capacity  # most rows are filled: an eager step reads those alone
    return q, k, v, torch.tensor(position, device=generator.device)


def _expert_arguments(sizes: SyncSizes, generator: torch.Generator, call: int) -> tuple[Tensor, ...]:
    x = _normal(generator, sizes.rows, sizes.hidden, dtype=sizes.dtype)
    return x, _normal(generator, sizes.rows, sizes.experts, dtype=sizes.dtype)


def _sampling_arguments(sizes: SyncSizes, generator: torch.Generator, call: int) -> tuple[Tensor, ...]:
    logits = _normal(generator, sizes.vocabulary, dtype=sizes.dtype) * 4
    numbers = torch.tensor([0.7 + call % 5 / 10, 0.001 * (call % 7)], device=generator.device)
    noise = torch.empty(sizes.kept, device=generator.device).exponential_(generator=generator)
    return logits, numbers[0].clone(), numbers[1].clone(), noise


PATTERNS = (
    Pattern("cache row and attention at a position", RingAttention, RingAttentionByHand, _attention_arguments),
    Pattern("loop over experts with counts", ExpertLoop, ExpertLoopByHand, _expert_arguments),
    Pattern("top-k above a threshold", ThresholdSampling, ThresholdSamplingByHand, _sampling_arguments),
)
