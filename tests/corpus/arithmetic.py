"""Arithmetic: a device value only scales, shifts or limits tensors. Promotion must stay that of a Python number."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.corpus.case import case, choice, noise, number, whole

OTHER_KERNEL = "pow has kernels of its own for the exponents 2, 3, 0.5 and -1 when they are known on the host"


@case(lambda i: (noise(i, 5), number(i)))
def a_float_item_scales(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale.item()


@case(lambda i: (noise(i, 5), number(i)))
def a_host_copy_scales(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale.cpu()


@case(lambda i: (noise(i, 5), whole(i, 0, 100)))
def an_int_item_scales(x: Tensor, count: Tensor) -> Tensor:
    return x * count.item()


@case(lambda i: (noise(i, 5), whole(i, 1, 50)))
def python_division_is_in_double(x: Tensor, count: Tensor) -> Tensor:
    """An int64 0-d tensor divided by 3.0 would be a float32."""
    scale = count.item() / 3.0
    return x + (scale - int(scale)) * 1e-3


@case(lambda i: (noise(i, 5), number(i, 1e-4)))
def a_sum_of_floats_is_in_double(x: Tensor, offset: Tensor) -> Tensor:
    shift = float(offset) + 1.0
    return x * (shift - 1.0)


@case(lambda i: (noise(i, 4, 4), whole(i, 2, 30)))
def an_attention_scale(x: Tensor, width: Tensor) -> Tensor:
    return x * int(width) ** -0.5


@case(lambda i: (noise(i, 5), whole(i, -9, 9)))
def floor_division_of_negative_ints(x: Tensor, count: Tensor) -> Tensor:
    n = count.item()
    return x * (n // 4) + n % 4


@case(lambda i: (noise(i, 5), number(i, 7.3)))
def int_of_a_float_truncates(x: Tensor, value: Tensor) -> Tensor:
    return x + int(value.item())


@case(lambda i: (noise(i, 5), number(i).abs()))
def a_float_item_clamps(x: Tensor, limit: Tensor) -> Tensor:
    return x.clamp(-float(limit), float(limit))


@case(lambda i: (noise(i, 5), number(i)))
def an_item_fills(x: Tensor, value: Tensor) -> Tensor:
    return x.masked_fill(x > 0, value.item()) + torch.full((5,), value.item(), device=x.device)


@case(lambda i: (noise(i, 2), number(i)))
def full_of_a_tensor(x: Tensor, value: Tensor) -> Tensor:
    return torch.full((3, 2), value, device=x.device) + x


@case(lambda i: (noise(i, 5), noise(i, 5, salt=1), number(i)))
def an_item_as_alpha(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    return torch.add(x, y, alpha=alpha.item())


@case(lambda i: (noise(i, 5).abs(), whole(i, 0, 5)), tolerance=OTHER_KERNEL)
def an_item_as_exponent(x: Tensor, exponent: Tensor) -> Tensor:
    return x ** exponent.item()


@case(lambda i: (noise(i, 5), number(i), number(i + 1)))
def min_and_max_of_items(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x * min(a.item(), b.item()) + max(float(a), 0.25)


@case(lambda i: (noise(i, 5), choice(i, 4, 9)))
def an_average_over_a_list(x: Tensor, lengths: Tensor) -> Tensor:
    values = lengths.tolist()
    return x * (sum(values) / len(values))


@case(lambda i: (noise(i, 5), number(i)))
def a_comparison_with_an_item(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x > threshold.item(), x, -x)


@case(lambda i: (noise(i, 5), number(i)))
def a_bool_counts_as_a_number(x: Tensor, value: Tensor) -> Tensor:
    return x * int((value > 0).item()) + (value < -1).item()


@case(lambda i: (noise(i, 5).bfloat16(), number(i)))
def bfloat16_keeps_its_dtype(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale.item()


@case(lambda i: (noise(i, 5).half(), number(i).double(), whole(i, 0, 5)))
def mixed_dtypes_promote_as_numbers(x: Tensor, scale: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    return x * scale.item() + count.item(), torch.arange(5, device=x.device) * scale.item()


@case(lambda i: (choice(i, 5, 9), whole(i, -3, 4)))
def an_int_tensor_and_an_int_item(x: Tensor, count: Tensor) -> Tensor:
    return (x + int(count)) * 3 - abs(int(count))


@case(lambda i: (noise(i, 5) * (i + 1),))
def normalised_by_its_largest(x: Tensor) -> Tensor:
    return x / x.abs().max().item()


@case(lambda i: (noise(i, 5), whole(i, 1, 9)))
class AMovingAverage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        weight = 1 / (1 + count.item())
        self.mean.mul_(1 - weight).add_(x, alpha=weight)
        return self.mean * 2


@case(lambda i: (noise(i, 5), number(i)), "host-sync")
def a_c_function_needs_a_real_float(x: Tensor, value: Tensor) -> Tensor:
    return x * math.exp(value.item())
