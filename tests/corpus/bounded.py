"""Lengths: a device value says how many entries there are. Slices, ranges and tensors of that length."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.corpus.case import DUPLICATES, PADDED_GEMM, REORDERED, case, choice, noise, number, whole


@case(lambda i: (noise(i, 6, 3), whole(i, 0, 7)), tolerance=REORDERED)
def sum_of_a_prefix(x: Tensor, length: Tensor) -> Tensor:
    return x[: int(length)].sum(0)


@case(lambda i: (noise(i, 6, 3), whole(i, 0, 7)), tolerance=REORDERED)
def mean_of_a_prefix_that_may_be_empty(x: Tensor, length: Tensor) -> Tensor:
    return x[: length.item()].mean(0)


@case(lambda i: (noise(i, 6, 3), whole(i, 1, 7)))
def extremes_of_a_prefix(x: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    part = x[: int(length)]
    return part.amax(0), part.min(), part.argmax(0)


@case(lambda i: (noise(i, 6, 3), whole(i, 0, 7)))
def any_all_and_count_of_a_prefix(x: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    positive = x[: int(length)] > 0
    return positive.any(0), positive.all(0), positive.sum()


@case(lambda i: (noise(i, 6), whole(i, 2, 7)), tolerance=REORDERED)
def spread_of_a_prefix(x: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    part = x[: int(length)]
    return part.std(), part.norm(), part.logsumexp(0)


@case(lambda i: (noise(i, 8), noise(i, 8, 3, salt=1), whole(i, 1, 9)), tolerance=REORDERED)
def attention_over_a_prefix(scores: Tensor, values: Tensor, length: Tensor) -> Tensor:
    n = int(length)
    return scores[:n].softmax(-1) @ values[:n]


@case(lambda i: (noise(i, 1, 2, 1, 4), noise(i, 1, 2, 8, 4, salt=1), whole(i, 1, 9)), tolerance=REORDERED)
def fused_attention_over_a_prefix(q: Tensor, kv: Tensor, length: Tensor) -> Tensor:
    n = int(length)
    return F.scaled_dot_product_attention(q, kv[:, :, :n], kv[:, :, :n])


@case(lambda i: (noise(i, 8, 2), whole(i, 0, 4), whole(i, 4, 9)), tolerance=REORDERED)
def a_slice_between_two_items(x: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    return x[t0:t1].mean(0)


@case(lambda i: (noise(i, 8, 2), whole(i, 1, 9)))
def a_suffix(x: Tensor, length: Tensor) -> Tensor:
    return x[-int(length) :].amax(0)


@case(lambda i: (noise(i, 9, 2), whole(i, 1, 10)))
def a_slice_with_a_step(x: Tensor, length: Tensor) -> Tensor:
    return x[: int(length) : 2].amin(0)


@case(lambda i: (noise(i, 7, 2), whole(i, 1, 8)), bounds={"positions": 7}, tolerance=REORDERED)
def rows_at_an_arange(table: Tensor, length: Tensor) -> Tensor:
    positions = torch.arange(length, device=table.device)
    return table[positions].sum(0) + positions.max()


@case(lambda i: (noise(i, 4), whole(i, 0, 9)), bounds={"n": 8}, tolerance=REORDERED)
def full_of_an_unbounded_length(x: Tensor, length: Tensor) -> Tensor:
    n = int(length)
    return x * torch.full((n,), 0.5, device=x.device).sum()


@case(
    lambda i: (noise(i, 4), torch.tensor(7) if i % 7 == 6 else whole(i, 0, 5)),
    bounds={"n": 4},
    eager_calls=2,
    tolerance=REORDERED,
)
def a_bound_that_is_exceeded_now_and_then(x: Tensor, length: Tensor) -> Tensor:
    n = int(length)
    return x * torch.ones(n, device=x.device).sum()


@case(lambda i: (noise(i, 4), whole(i, 0, 9)), tolerance=REORDERED)
def a_length_bounded_by_a_check(x: Tensor, length: Tensor) -> Tensor:
    n = length.item()
    torch._check(n >= 0)
    torch._check(n <= 8)
    return x + torch.arange(n, device=x.device).float().sin().sum()


@case(lambda i: (noise(i, 4), whole(i, 0, 9)), "host-sync", remedy="bounds={")
def an_unbounded_length(x: Tensor, length: Tensor) -> Tensor:
    return x + torch.arange(int(length), device=x.device).float().sum()


@case(lambda i: (noise(i, 6, 2), noise(i, 3, 2, salt=1), whole(i, 0, 7)), tolerance=REORDERED)
def cat_with_a_prefix(x: Tensor, y: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    joined = torch.cat([x[: int(length)], y, x[: int(length)] * 2])
    return joined.sum(0), joined.softmax(0).amax(0)


@case(lambda i: (noise(i, 5, 2), whole(i, 0, 6), whole(i + 2, 0, 6), noise(i, 1, 2, salt=1)))
def cat_of_two_prefixes(x: Tensor, first: Tensor, second: Tensor, last: Tensor) -> Tensor:
    joined = torch.cat((x[: int(first)], x[: int(second)].neg(), last))
    return joined[-1] + joined.amax(0)


@case(lambda i: (noise(i, 4, 6), noise(i, 6, 3, salt=1), whole(i, 0, 7)), tolerance=REORDERED)
def matmul_contracts_a_prefix(w: Tensor, x: Tensor, length: Tensor) -> Tensor:
    n = length.item()
    return w[:, :n] @ x[:n]


@case(lambda i: (noise(i, 6, 4), whole(i, 1, 7)), tolerance=REORDERED)
def both_sides_of_a_product_have_the_length(x: Tensor, length: Tensor) -> Tensor:
    part = x[: int(length)]
    causal = (part @ part.T).tril()
    return causal.softmax(-1).sum(0).amax()


@case(lambda i: (noise(i, 6, 4), whole(i, 0, 7)), tolerance=PADDED_GEMM)
class RowsThroughALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(4), nn.Linear(4, 3)
        self.register_buffer("out", torch.zeros(6, 3))

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        n = int(length)
        self.out[:n] = self.up(self.norm(x[:n])).relu()
        return self.out * 2


@case(lambda i: (noise(i, 8), whole(i, 0, 9)))
def top_k_of_what_there_is(scores: Tensor, length: Tensor) -> Tensor:
    n = int(length)
    values, indices = scores[:n].topk(min(3, n))
    return torch.zeros_like(scores).index_add(0, indices, values)


@case(lambda i: (noise(i, 8), whole(i, 3, 9)))
def constant_top_k_of_a_prefix(scores: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = scores[: int(length)].topk(3)
    return values, indices


@case(lambda i: (noise(i, 8), whole(i, 1, 9)))
def sorting_and_running_sums_of_a_prefix(x: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    part = x[: int(length)]
    ordered = part.sort(descending=True).values
    return ordered[0] - ordered[-1], part.cumsum(0)[-1]


@case(lambda i: (noise(i, 2), torch.tensor(i)), tolerance=REORDERED)
class CommittedEntries(nn.Module):
    """The number of entries follows from the position, as in compressed attention."""

    def __init__(self) -> None:
        super().__init__()
        self.ratio = 4
        self.register_buffer("entries", torch.randn(8, 2))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        end_pos = int(position) + 1
        n_committed = end_pos // self.ratio
        keys = torch.cat([x.unsqueeze(0), self.entries[:n_committed]])
        return (keys @ x).softmax(0) @ keys


@case(lambda i: (noise(i, 6, 2), whole(i, 0, 7)))
def padded_to_its_bound(x: Tensor, length: Tensor) -> Tensor:
    n = int(length)
    return F.pad(x[:n], (0, 0, 0, 6 - n), value=-1.0)


@case(lambda i: (noise(i, 6, 2), noise(i, 2, salt=1), whole(i, 1, 7)), bounds={"n": 6}, tolerance=REORDERED)
def reshaped_and_expanded(x: Tensor, row: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    n = int(length)
    return x[:n].reshape(-1).amax(), row.expand(n, -1).sum(0)


@case(lambda i: (noise(i, 6, 2), choice(i, 6, 4), whole(i, 0, 7)), tolerance=DUPLICATES)
def a_prefix_is_scattered(x: Tensor, where: Tensor, length: Tensor) -> Tensor:
    n = int(length)
    return x.new_zeros(4, 2).index_add_(0, where[:n], x[:n])


@case(lambda i: (noise(i, 2), whole(i, 0, 7), number(i)))
def counted_in_a_shape(x: Tensor, length: Tensor, scale: Tensor) -> Tensor:
    entries = torch.zeros(6, device=x.device)[: int(length)]
    return x * entries.shape[0] + scale * (entries.numel() + 1)


@case(lambda i: (noise(i, 3, 4), choice(i, 2, 4)), tolerance=REORDERED)
def ragged_sequences(x: Tensor, bounds: Tensor) -> Tensor:
    """Three sequences of 4 tokens at most, two of which are cut by what a list says."""
    first, second = bounds.tolist()
    rows = [x[0, :first], x[1, :second], x[2]]
    return torch.stack([row.sum() for row in rows])


@case(lambda i: (noise(i, 12, 2), choice(i, 3, 5).cumsum(0)), tolerance=REORDERED)
def sequences_between_cumulative_lengths(x: Tensor, ends: Tensor) -> Tensor:
    cu_seqlens = [0, *ends.tolist()]
    return torch.stack([x[a:b].sum(0) for a, b in itertools.pairwise(cu_seqlens)])
