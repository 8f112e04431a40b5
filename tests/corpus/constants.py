"""Host constants made in the step, and Python values that change from step to step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.corpus.case import case, noise, number, whole


@case(lambda i: (noise(i, 4),), steady=True)
def a_scalar_tensor(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.tensor(3.0, device=x.device)) - torch.tensor(0.1, device=x.device)


@case(lambda i: (noise(i, 4),), steady=True)
def tensors_of_lists(x: Tensor) -> Tensor:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], device=x.device)
    order = torch.as_tensor([3, 1, 0, 2], device=x.device)
    return (x * weights)[order]


@case(lambda i: (noise(i, 4),), steady=True)
def tensors_of_arrays(x: Tensor) -> Tensor:
    ramp = np.linspace(0.0, 1.0, 4, dtype=np.float32)
    return x * torch.as_tensor(ramp, device=x.device) + torch.from_numpy(ramp[::-1].copy()).to(x.device)


@case(lambda i: (noise(i, 4),), steady=True)
def a_host_scalar_in_a_device_operator(x: Tensor) -> Tensor:
    return x * torch.tensor(2.5) + torch.scalar_tensor(0.25)


@case(lambda i: (noise(i, 4),), steady=True)
class AHostTableIsUploaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slopes = torch.linspace(0, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.slopes.to(x.device) + x.new_tensor([1.0, 0.0, 0.0, 1.0])


@case(lambda i: (noise(i, 4), whole(i, 0, 4)))
def many_small_uploads_and_an_item(x: Tensor, where: Tensor) -> Tensor:
    parts = [x * torch.as_tensor(scale, device=x.device) for scale in (0.5, 1.5, 2.5, 3.5)]
    return torch.stack(parts)[:, int(where)] + torch.tensor([index * 2 for index in range(4)], device=x.device)


@case(lambda i: (noise(i, 4), whole(i, 0, 5), whole(i + 1, 0, 5)))
def a_tensor_of_items(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    offsets = torch.tensor([int(first), int(second), 1, 0], device=x.device)
    return x + offsets


@case(lambda i: (noise(i, 4),), "changing-value")
def an_array_that_changes(x: Tensor) -> Tensor:
    return x + torch.as_tensor(np.random.random(4).astype(np.float32), device=x.device)


@case(lambda i: (noise(i, 4),))
class ACounterOfTheModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return x * self.step + 1 / self.step


class Entries:
    """A cache that counts in Python."""

    def __init__(self) -> None:
        self.length = 0


@case(lambda i: (noise(i, 2),))
class ACounterOfACache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(48, 2))
        self.cache = Entries()

    def forward(self, x: Tensor) -> Tensor:
        self.keys[self.cache.length] = x
        self.cache.length += 1
        return self.keys.amax(0)


@case(lambda i: (noise(i, 2),))
class ARingIndexInPython(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.window, self.position = 5, 0
        self.register_buffer("ring", torch.zeros(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.ring[self.position] = x
        self.position = (self.position + 1) % self.window
        return self.ring * 2


@case(lambda i: (noise(i, 2),))
class EveryFourthStepClears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {"steps": 0}
        self.register_buffer("sums", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.state["steps"] % 4 == 0:
            self.sums.zero_()
        self.sums += x
        self.state["steps"] += 1
        return self.sums.clone()


@case(lambda i: (noise(i, 3, 2), number(i)))
class TwoCountersAtDifferentSpeeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.calls = 0, 0

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        self.tokens += x.shape[0]
        self.calls += 1
        return x * scale.item() + self.tokens - 2 * self.calls


@case(lambda i: (noise(i, 2),))
class ALengthCountedInPython(nn.Module):
    """The keys in use are a slice that grows by one row per step."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.register_buffer("keys", torch.zeros(48, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.keys[self.length] = x
        self.length += 1
        return self.keys[: self.length].amax(0)


@case(lambda i: (noise(i, 3), i % 3), eager_calls=2)
def a_number_that_the_caller_knows(x: Tensor, kind: int) -> Tensor:
    return x * (kind + 1)


@case(lambda i: (noise(i, 3),), "changing-value")
class AScheduleInPythonFloats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.rate = self.rate * 0.9 + 1 / (3 + self.rate)
        return x * self.rate


@case(lambda i: (noise(i, 3),), "changing-value")
def a_random_python_number(x: Tensor) -> Tensor:
    return x * random.random()
