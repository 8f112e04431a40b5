"""Control flow: a device value picks a branch, the trips of a loop, or whether to go on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.corpus.case import case, choice, noise, number, phase, whole


@case(lambda i: (noise(i, 5),), merged=True)
def both_sides_are_pure(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x - 1


@case(lambda i: (noise(i, 5), number(i)), merged=True)
def a_conditional_expression(x: Tensor, value: Tensor) -> Tensor:
    return (x.relu() if value.item() > 0 else x.abs()) + 1


@case(lambda i: (noise(i, 5), number(i), number(i * 3 + 1)), merged=True)
def and_or_not(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a > 0 and not b > 0:
        x = x + 1
    if a < -0.5 or b < -0.5:
        x = x * 2
    return x


@case(lambda i: (noise(i, 5).clamp(-3, 3) * (40 if i % 8 == 5 else 1),), eager_calls=1)
def an_assertion_that_may_fail(x: Tensor) -> Tensor:
    assert (x.abs() <= 3).all(), "out of range"
    assert x.isfinite().all()
    return x * 2


@case(lambda i: (noise(i, 3), number(i)), merged=True)
class OneSideWritesState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("best", torch.zeros(3))

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        if value > 0:
            self.best.copy_(x)
        return self.best + value


@case(lambda i: (noise(i, 3).abs(),), merged=True)
class StateIsWrittenBeforeARareBranch(nn.Module):
    """Whoever notices the branch late has to put the state back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3))
        self.register_buffer("clears", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.sums += x
        if self.sums.max() > 6:
            self.sums.zero_()
            self.clears += 1
        return self.sums / (1 + self.clears)


@case(lambda i: (noise(i, 3),))
def random_numbers_decide(x: Tensor) -> Tensor:
    drawn = torch.rand_like(x)
    if drawn.sum() > 1.5:
        return x * torch.rand_like(x)
    return x + drawn


@case(lambda i: (noise(i, 3), number(i)), merged=True)
class BothSidesWriteState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("high", torch.zeros(3))
        self.register_buffer("low", torch.zeros(3))

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        if value > 0:
            self.high.add_(x)
            out = x * 3
        else:
            self.low.mul_(0.5).sub_(x)
            out = self.low.abs()
        return out + self.high


@case(lambda i: (noise(i, 3), torch.tensor(i % 6)), merged=True)
class ResetAtTheStart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.ones(3))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        start_pos = position.item()
        if start_pos == 0:
            self.state.zero_()
        self.state += x * (start_pos + 1)
        return self.state.clone()


@case(lambda i: (noise(i, 6, 2), choice(i, 3, 2 if i % 3 else 1)), merged=True)
def an_early_out(x: Tensor, lengths: Tensor) -> Tensor:
    total = int(lengths.sum())
    if total == 0:
        return torch.zeros(2, device=x.device)
    return x[:total].amax(0)


@case(lambda i: (noise(i, 5), phase(i, 3)), merged=True)
def a_chain_of_cases(x: Tensor, kind: Tensor) -> Tensor:
    which = int(kind)
    if which == 0:
        return x.relu()
    elif which == 1:
        return x.tanh()
    return x.sigmoid()


@case(lambda i: (noise(i, 5), phase(i, 3)), eager_calls=2)
def a_dictionary_of_functions(x: Tensor, kind: Tensor) -> Tensor:
    functions = {0: torch.relu, 1: torch.tanh, 2: torch.sigmoid}
    return functions[kind.item()](x)


@case(lambda i: (noise(i, 5), number(i), number(i * 2 + 1)), merged=True)
def nested_branches(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a > 0:
        x = x + a
        if b > 0:
            return x * b
        return x - 1
    return x.neg()


@case(lambda i: (noise(i, 5) * 2 ** (i // 4),))
def a_while_loop(x: Tensor) -> Tensor:
    while x.abs().max() > 1.5:
        x = x / 2
    return x


@case(lambda i: (noise(i, 5), torch.tensor(1 + i // 5)))
def a_loop_of_as_many_trips(x: Tensor, trips: Tensor) -> Tensor:
    for _ in range(trips):
        x = (x * 1.5).sin()
    return x


@case(lambda i: (noise(i, 5), whole(i, 1, 5)))
def a_loop_over_a_range_with_items(x: Tensor, trips: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for index in range(int(trips)):
        out = out * 0.5 + x[index]
    return out


@case(lambda i: (noise(i, 4, 4, salt=i // 4), torch.tensor(0)))
class GenerationStopsEarly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(4, 4))

    def forward(self, x: Tensor, end: Tensor) -> Tensor:
        tokens = []
        for _ in range(3):
            x = (x @ self.weight).tanh()
            tokens.append(x.sum(0).argmax())
            if tokens[-1] == end:
                break
        return x + tokens[-1]


@case(lambda i: (noise(i, 4), choice(i, 3, 3)), merged=True)
def empty_groups_are_skipped(x: Tensor, counts: Tensor) -> Tensor:
    out = x.clone()
    for group in range(3):
        if counts[group] == 0:
            continue
        out = out * (group + 2) + counts[group]
    return out


@case(lambda i: (noise(i, 5) if i % 3 else noise(i, 5).fill_(float("nan")),), merged=True)
def broken_numbers_are_replaced(x: Tensor) -> Tensor:
    if torch.isnan(x).any():
        x = torch.nan_to_num(x, nan=7.0)
    return x * 2


@case(lambda i: (noise(i, 4), noise(i, 4) * (1.0, 1.0 + 1e-6, 2.0)[i % 3]))
def equal_and_allclose(x: Tensor, y: Tensor) -> Tensor:
    if torch.equal(x, y):
        return x * 3
    if torch.allclose(x, y):
        return x + y
    return x.neg()


@case(lambda i: (noise(i, 3, 4), noise(i // 4, 3, salt=1)), eager_calls=4)
def an_order_found_on_the_host(x: Tensor, scores: Tensor) -> Tensor:
    order = sorted(range(3), key=lambda row: float(scores[row]))
    return torch.cat([x[row] for row in order])


@case(lambda i: ([noise(i, 3), noise(i, 3, salt=1), noise(i, 3, salt=2)],))
def any_over_a_generator(parts: list[Tensor]) -> Tensor:
    if any(part.max() > 1 for part in parts):
        return parts[0] + parts[1]
    return parts[2] * 2


@case(lambda i: (noise(i, 3), torch.tensor(i)), merged=True)
class ACounterInATensorDrivesABranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("kept", torch.zeros(3))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.steps += 1
        if self.steps % 3 == 0:
            self.kept.copy_(x)
        return self.kept * position


@case(lambda i: (noise(i, 3), whole(i, 1, 4)), eager_calls=2)
def a_slice_is_returned(x: Tensor, length: Tensor) -> Tensor:
    """Each length is a way of its own: the size of a result is a host value."""
    return torch.arange(3, device=x.device)[: int(length)] + 1


@case(lambda i: (noise(i, 3), number(i)), "changing-value")
class BothSidesChangePython(nn.Module):
    """What a list holds afterwards depends on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str] = []

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        if value > 0:
            self.taken.append("high")
            return x * 2
        self.taken.append("low")
        return x - 1
