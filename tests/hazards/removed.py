"""Host values that were taken out of a step: which read is which, what other outcomes do, what the side not taken raises."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.hazards.case import AUTOCAST, INFERENCE, NO_GRAD, Run, hazard, noise, steps, whole

Tensor = torch.Tensor
ALL = (NO_GRAD, INFERENCE, AUTOCAST)


def edges_between_kept(edges: Tensor, keep: Tensor) -> Tensor:
    return edges[:, keep[edges[0]] & keep[edges[1]]]


def masks_in_one_line(edges: Tensor, keep: Tensor) -> Tensor:
    return edges[0][keep].sum() * 100 + edges[1][~keep].sum()


def a_mask_of_a_mask(edges: Tensor, keep: Tensor) -> Tensor:
    return edges[0][keep][edges[1][keep] > 1].sum()


def reads_in_one_expression(edges: Tensor, keep: Tensor) -> Tensor:
    return edges * (int(edges[0, 0]) + 10 * int(edges[1, 1])) + (edges.sum() if edges[0, 1] > edges[1, 0] else edges.max())


def state_by_a_mask(edges: Tensor, keep: Tensor) -> Tensor:
    kv = edges.float().clone()
    kv[:, keep] += kv[0][keep].sum() + kv[1][~keep].sum()
    return kv


steps(
    "F",
    *(edges_between_kept, masks_in_one_line, a_mask_of_a_mask, reads_in_one_expression, state_by_a_mask),
    arguments=lambda i: (whole(i, 5, 2, 5), noise(i + 9, 5) > 0),
    contexts=ALL,
    calls=10,
)


def repeats_in_one_line(x: Tensor, a: Tensor, n: Tensor) -> Tensor:
    return x.repeat_interleave(a, output_size=12).sum() + x.repeat_interleave(n)[:8].sum()


def repeats_the_other_way(x: Tensor, a: Tensor, n: Tensor) -> Tensor:
    return x.repeat_interleave(n)[:8].sum() - x.repeat_interleave(a, output_size=12).sum() * x.repeat_interleave(n)[1]


def _repeats(i: int) -> tuple[Tensor, Tensor, Tensor]:
    return noise(i, 4), torch.tensor([3, 3, 3, 3]).roll(i), whole(i, 4, 4) + 1


steps("F", repeats_in_one_line, repeats_the_other_way, arguments=_repeats, contexts=ALL, calls=10)


def rows_by_index_by_mask(o: Tensor, k: Tensor, j: Tensor) -> Tensor:
    return o[k[j] > 3].sum()


def indexed_twice(o: Tensor, k: Tensor, j: Tensor) -> Tensor:
    return o[j][k > 3]


def written_where_class_is(o: Tensor, k: Tensor, j: Tensor) -> Tensor:
    kv = o.clone()
    kv[k[j] == 1] += 1
    kv[k == 2] -= o[k == 2].sum()
    return kv


steps(
    "F",
    *(rows_by_index_by_mask, indexed_twice, written_where_class_is),
    arguments=lambda i: (noise(i, 6), whole(i, 6, 6), whole(i + 3, 6, 6)),
    contexts=ALL,
    calls=10,
)


def mask_by_groups(scores: Tensor, batch: Tensor, k: Tensor) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    order = order[batch[order].argsort(stable=True)]
    sizes = torch.zeros(3, dtype=torch.long, device=scores.device).scatter_add_(0, batch, torch.ones_like(batch))
    start = sizes.cumsum(0) - sizes
    place = torch.arange(len(scores), device=scores.device) - start[batch[order]]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[place < k[batch[order]]]] = True
    return scores * mask


def written_by_index_of_mask(scores: Tensor, batch: Tensor, k: Tensor) -> Tensor:
    out = torch.zeros_like(scores)
    out[batch[scores > 0]] = scores[scores > 0].cumsum(0)[-1:].sum()
    return out


steps(
    "F",
    *(mask_by_groups, written_by_index_of_mask),
    arguments=lambda i: (noise(i, 7), whole(i, 2 + i % 2, 7), whole(i + 5, 3, 3)),
    contexts=ALL,
    calls=14,
)


def sampled_or_best(x: Tensor, temperature: Tensor) -> Tensor:
    if temperature > 0:
        return torch.multinomial((x / temperature).softmax(-1), 1)
    return x.argmax(-1, keepdim=True)


def drawn_or_zero(x: Tensor, temperature: Tensor) -> Tensor:
    if temperature > 0:
        return torch.bernoulli((x / temperature).sigmoid() / (temperature > 0))
    return torch.zeros_like(x)


def factorised_or_not(x: Tensor, temperature: Tensor) -> Tensor:
    gram = x.mT @ x * temperature
    if temperature > 0:
        return torch.linalg.cholesky(gram + temperature * torch.eye(4, device=x.device))
    return gram


def inverted_or_not(x: Tensor, temperature: Tensor) -> Tensor:
    scaled = torch.eye(4, device=x.device) * temperature
    return torch.linalg.inv(scaled) if temperature > 0 else scaled


def one_hot_or_not(x: Tensor, temperature: Tensor) -> Tensor:
    classes = x.argmax(-1) * temperature.long() * 9
    return torch.nn.functional.one_hot(classes, 5).float() if temperature == 0 else x


steps(
    "F",
    *(sampled_or_best, drawn_or_zero, factorised_or_not, inverted_or_not, one_hot_or_not),
    arguments=lambda i: (noise(i, 3, 4), torch.tensor(float((i + 1) % 3))),
    contexts=(NO_GRAD, INFERENCE),
    calls=8,
)


def largest_plus_one(index: Tensor, s: Tensor) -> Tensor:
    n = int(index.max()) + 1
    return torch.full((n,), -float("inf"), device=s.device).scatter_reduce_(0, index, s, "amax")


def columns_appended(index: Tensor, s: Tensor) -> Tensor:
    more = max(int(index.max()) - 3 + 1, 0)
    wide = torch.cat([s.new_zeros(3), s.new_zeros(more)])
    return wide.scatter_add(0, index, s).cumsum(0)


def added_at_index(index: Tensor, s: Tensor) -> Tensor:
    return torch.zeros(int(index.max()) + 1, device=s.device).index_add_(0, index, s)


def copied_at_index(index: Tensor, s: Tensor) -> Tensor:
    return torch.zeros(int(index.max()) + 1, device=s.device).index_copy_(0, index[:1], s[:1])


def filled_at_index(index: Tensor, s: Tensor) -> Tensor:
    return torch.zeros(int(index.max()) + 1, device=s.device).index_fill_(0, index, 2.0)


def put_at_index(index: Tensor, s: Tensor) -> Tensor:
    return torch.zeros(int(index.max()) + 1, device=s.device).put_(index[:1], s[:1])


def one_hot_of_largest(index: Tensor, s: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(index, int(index.max()) + 1).sum(0) * 2


def loss_over_largest(index: Tensor, s: Tensor) -> Tensor:
    scores = torch.zeros(4, int(index.max()) + 1, device=s.device) + s[:, None]
    return torch.nn.functional.nll_loss(scores.log_softmax(-1), index)


steps(
    "F",
    *(largest_plus_one, columns_appended, added_at_index, copied_at_index, filled_at_index, put_at_index),
    *(one_hot_of_largest, loss_over_largest),
    arguments=lambda i: ((whole(i, 3, 4) + i % 5).clamp(max=15), noise(i, 4)),
    contexts=(NO_GRAD, INFERENCE),
    calls=9,
    bounds={"n": 8, "more": 8},
)
assert hazard


def divided_and_not_used(x: Tensor, n: Tensor) -> Tensor:
    1 // int(n)
    return x * 2


def true_division_not_used(x: Tensor, n: Tensor) -> Tensor:
    1 / n.item()
    return x * 2


def remainder_not_used(x: Tensor, n: Tensor) -> Tensor:
    divmod(7, int(n))
    return x * 2


def negative_power_not_used(x: Tensor, n: Tensor) -> Tensor:
    n.item() ** -1
    return x * 2


def shifted_and_not_used(x: Tensor, n: Tensor) -> Tensor:
    1 << int(n)
    return x * 2


def divided_on_one_side(x: Tensor, n: Tensor) -> Tensor:
    if x[0] > 0:
        1 // int(n)
    return x * 2


def division_caught(x: Tensor, n: Tensor) -> Tensor:
    try:
        k = 8 // int(n)
    except ZeroDivisionError:
        k = 7
    return x * k


steps(
    "F",
    *(divided_and_not_used, true_division_not_used, remainder_not_used, negative_power_not_used),
    *(divided_on_one_side, division_caught),
    arguments=lambda i: (noise(i, 3), torch.tensor((2, 2, 3, 0, 2, -1, 0, 5)[i])),
    contexts=ALL,
    calls=8,
    replays=3,
)


steps(
    "F",
    shifted_and_not_used,
    arguments=lambda i: (noise(i, 3), torch.tensor((2, 2, 3, 0, 2, -1, 0, 5)[i])),
    contexts=ALL,
    calls=8,
    replays=3 if torch.__version__ >= "2.12" else 0,  # before, torch fails to evaluate shifts of symbols: the step runs eagerly
)


def truncated_and_not_used(x: Tensor, f: Tensor) -> Tensor:
    int(f.item())
    return x * 2


def rounded_and_not_used(x: Tensor, f: Tensor) -> Tensor:
    round(f.item())
    return x * 2


def overflown_and_not_used(x: Tensor, f: Tensor) -> Tensor:
    f.item() ** 200.0
    return x * 2


def _fractions(i: int) -> tuple[Tensor, Tensor]:
    return noise(i, 3), torch.tensor((0.5, 1.5, 2.5, float("nan"), 2.0, float("inf"), 0.25, 1e30)[i])


steps(
    "F",
    truncated_and_not_used,
    rounded_and_not_used,
    overflown_and_not_used,
    arguments=_fractions,
    contexts=ALL,
    calls=8,
    replays=3,
)


def rows_that_are_set(x: Tensor) -> tuple[Tensor, ...]:
    rows = (x < 0.5).nonzero()
    return rows, rows.t(), rows.float() + 1, (x.view(2, 4) < 0.5).nonzero()


@hazard("F", contexts=ALL, replays=4)
def strides_of_rows_that_are_set(device: torch.device) -> Run:
    def strided(called: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor], list[tuple[int, ...]]]:
        return lambda x: [made.stride() for made in called(x)]

    return Run(rows_that_are_set, lambda i: (noise(3, 8, device=device),), wrap=strided)
