"""Values that the host reads from tensors which the step holds itself, and changes as it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.corpus.case import REORDERED, case, noise


@case(lambda i: (noise(i, 3),))
class CountInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        n = int(self.count)
        self.count.add_(2)
        return x * n


@case(lambda i: (noise(i, 3),))
class CountReadBetweenWrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        before = self.count.item()
        self.count.mul_(3).remainder_(17)
        return x * before + int(self.count)


@case(lambda i: (noise(i, 3),), tolerance=REORDERED)
class LengthOfItsOwnCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kv", torch.zeros(32, 3))
        self.register_buffer("length", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        end = int(self.length)
        self.kv[end] = x
        self.length.add_(1).remainder_(24)
        return torch.softmax(self.kv[: end + 1] @ x, 0) @ self.kv[: end + 1]


@case(lambda i: (noise(i, 4, 3),))
class ListFromABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor([[0, 2], [1, 3]]))

    def forward(self, x: Tensor) -> Tensor:
        (a, b), (c, _) = self.rows.tolist()
        self.rows.add_(1).remainder_(4)
        return x[a] + x[b] * c


@case(lambda i: (noise(i, 3),))
class FlagInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("odd", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.odd:
            x = x + 1
        self.odd.logical_not_()
        return x * 2


class _Counted:
    """A cache that is no module: its tensors are found as the step uses them."""

    def __init__(self) -> None:
        self.count = torch.zeros((), dtype=torch.int64)


@case(lambda i: (noise(i, 3),))
class CountBehindAnObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache = _Counted()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CountBehindAnObject:
        self.cache.count = fn(self.cache.count)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        n = self.cache.count.item()
        self.cache.count += 3
        return x + n


@case(lambda i: (noise(i, 5, 3),))
class ArrayOfABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("row", torch.tensor([0, 1]))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.row.cpu().numpy()
        self.row.add_(1).remainder_(5)
        return x[int(first)] - x[int(second)]
