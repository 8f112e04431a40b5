"""Lengths that operators find out: masks, ``nonzero``, ``unique``, ``repeat_interleave``, ``bincount``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.corpus.case import PADDED_GEMM, REORDERED, case, choice, mask, noise


@case(lambda i: (noise(i, 6, 2), mask(i, 6)), tolerance=REORDERED)
def sum_of_masked_rows(x: Tensor, keep: Tensor) -> Tensor:
    return x[keep].sum(0)


@case(lambda i: (noise(i, 6, 2), mask(i, 6, empty=False)), tolerance=REORDERED)
def softmax_over_masked_rows(x: Tensor, keep: Tensor) -> Tensor:
    chosen = x[keep]
    return chosen.softmax(0).amax(0) + chosen.mean(0)


@case(lambda i: (noise(i, 3, 4), mask(i, 3, 4)), tolerance=REORDERED)
def a_mask_of_two_dimensions(x: Tensor, keep: Tensor) -> Tensor:
    return x[keep].square().sum() + keep.sum()


@case(lambda i: (noise(i, 6, 2), mask(i, 6)))
def a_number_is_written_where_a_mask_says(x: Tensor, keep: Tensor) -> Tensor:
    out = x.clone()
    out[keep] = -1.0
    out[out > 1] *= 0.5
    return out


@case(lambda i: (noise(i, 3, 4), noise(i + 1, 1)), steady=True)
def a_mask_is_filled_with_a_number_of_the_device(x: Tensor, value: Tensor) -> Tensor:
    """A kernel for a GPU has the host read the number."""
    x = x.masked_fill(x > 0.5, value.sum())
    return x.masked_fill_(x < -0.5, value[0])


@case(lambda i: (noise(i, 6, 4), mask(i, 6)), tolerance=PADDED_GEMM)
class MaskedRowsThroughALayerAndBack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("hidden", torch.zeros(6, 4))

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        self.hidden[active] = self.layer(x[active]).tanh()
        return self.hidden + 0.5


@case(lambda i: (noise(i, 6, 2), mask(i, 6)))
class StateIsUpdatedWhereAMaskSays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(6, dtype=torch.int64))

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        self.count[active] += 1
        self.count[self.count > 3] = 0
        return x * self.count.unsqueeze(1)


@case(lambda i: (noise(i, 8), mask(i, 8)), tolerance=REORDERED)
def masked_select_and_scatter(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    chosen = torch.masked_select(x, keep)
    return chosen.sum(), torch.zeros_like(x).masked_scatter(keep, chosen * 2)


@case(lambda i: (noise(i, 6, 2), mask(i, 6)))
def rows_at_nonzero(x: Tensor, keep: Tensor) -> Tensor:
    indices = keep.nonzero().squeeze(1)
    return x.new_zeros(6, 2).index_copy(0, indices, x[indices] * 3)


@case(lambda i: (noise(i, 6), mask(i, 6)))
def the_count_of_nonzero(x: Tensor, keep: Tensor) -> Tensor:
    found = torch.nonzero(keep)
    return x * found.shape[0] / (1 + len(found))


@case(lambda i: (noise(i, 4, 3), mask(i, 4, 3)), tolerance=REORDERED)
def where_of_a_condition(x: Tensor, keep: Tensor) -> Tensor:
    rows, columns = torch.where(keep)
    return x.new_zeros(4).index_add_(0, rows, x[rows, columns])


@case(lambda i: (noise(i, 5, 2), mask(i, 5)), tolerance=REORDERED)
def a_loop_over_nonzero(x: Tensor, keep: Tensor) -> Tensor:
    total = torch.zeros(2, device=x.device)
    for index in keep.nonzero():
        total = total * 0.5 + x[index[0]]
    return total


@case(lambda i: (noise(i, 9, 2), choice(i, 6, 9)), tolerance=REORDERED)
def unique_rows_of_a_table(table: Tensor, ids: Tensor) -> Tensor:
    used = torch.unique(ids)
    return table[used].sum(0) / used.numel()


@case(lambda i: (noise(i, 9, 2), choice(i, 6, 9)))
def unique_and_back(table: Tensor, ids: Tensor) -> Tensor:
    used, inverse = torch.unique(ids, return_inverse=True)
    return table[used].tanh()[inverse]


@case(lambda i: (noise(i, 6), choice(i, 6, 3)), tolerance=REORDERED)
def runs_of_equal_ids(x: Tensor, ids: Tensor) -> Tensor:
    values, counts = torch.unique_consecutive(ids, return_counts=True)
    return x + (values * counts).sum() + counts.max()


@case(lambda i: (noise(i, 4, 2), choice(i, 4, 4)), bounds={"repeated": 12}, tolerance=REORDERED)
def repeat_interleave_by_counts(x: Tensor, counts: Tensor) -> Tensor:
    repeated = x.repeat_interleave(counts, dim=0)
    return (repeated * torch.arange(repeated.shape[0], device=x.device).unsqueeze(1)).sum(0)


@case(lambda i: (noise(i, 4, 2), choice(i, 4, 4)), steady=True)
def repeat_interleave_to_a_known_size(x: Tensor, counts: Tensor) -> Tensor:
    lengths = torch.cat([counts, 12 - counts.sum(0, keepdim=True)])
    padded = torch.cat([x, x.new_zeros(1, 2)])
    return padded.repeat_interleave(lengths, dim=0, output_size=12) + 1


@case(lambda i: (noise(i, 6, 4),), steady=True)
def bincount_of_routing(scores: Tensor) -> Tensor:
    chosen = scores.topk(2).indices
    return torch.bincount(chosen.flatten(), minlength=4) * 0.5


@case(lambda i: (noise(i, 6), choice(i, 6, 4)), tolerance=REORDERED, steady=True)
def weighted_bincount(x: Tensor, ids: Tensor) -> Tensor:
    return torch.bincount(ids.clamp(0, 3), weights=x, minlength=4).to(x.dtype)


@case(lambda i: (noise(i, 6, 2), mask(i, 6)), eager_calls=6)
def an_output_as_long_as_the_data_says(x: Tensor, keep: Tensor) -> Tensor:
    """Each length is a way of its own: the size of a result is a host value."""
    return x[keep]


@case(lambda i: (noise(i, 4, 2), choice(i, 4, 4)), "data-dependent-shape", remedy="bounds={")
def repeat_interleave_without_a_bound(x: Tensor, counts: Tensor) -> Tensor:
    return x.repeat_interleave(counts, dim=0).sum(0)
