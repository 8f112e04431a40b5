"""The operator ``graphs::skinny_linear``: linear layers that share an activation of few rows.

``x [M, K]``, weights ``[N, K]`` and, if any, a bias ``[N]`` or None for each, of one 16-bit float dtype; the results are ``x @
weight.T + bias``, sums in float32 with the bias among them, rounded once. The weights lie as they are or all transposed. On a
GPU, where `graphs.ops.wo_a.tiles.skinny` knows a tile, one launch per three weights; a library's product per weight elsewhere,
and always on a CPU. Nothing writes this operator by hand: `passes.skinny_products` puts it into compiled steps.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from graphs.errors import WeightError
from graphs.ops.wo_a import tiles
from graphs.ops.wo_a.operators import kernels, library

DTYPES = (torch.bfloat16, torch.float16)

library.define(
    "skinny_linear(Tensor x, Tensor[] weights, Tensor?[]? biases=None) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)
Biases = Sequence[Tensor | None] | None


def check(x: Tensor, weights: Sequence[Tensor], biases: Biases = None) -> None:
    """Raise WeightError unless the operands fit together. Reads metadata only."""
    if x.dim() != 2 or not weights or any(w.dim() != 2 or w.shape[1] != x.shape[1] for w in weights):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise WeightError(f"skinny_linear: x has shape {tuple(x.shape)}, the weights {shapes}; legal are [M, K] and [N, K]")
    if any(weight.dtype != x.dtype or weight.device != x.device for weight in weights):
        raise WeightError(f"skinny_linear: the weights must be {x.dtype} on {x.device}, as x is")
    if biases and len(biases) != len(weights):
        raise WeightError(f"skinny_linear: {len(biases)} biases for {len(weights)} weights; legal are none or one for each")
    for bias, weight in zip(biases or (), weights, strict=False):
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
            raise WeightError(
                f"skinny_linear: a bias has shape {tuple(bias.shape)} and is {bias.dtype} on {bias.device}; legal is "
                f"({weight.shape[0]},), {x.dtype} on {x.device}"
            )


def products(x: Tensor, weights: list[Tensor], biases: Biases = None) -> list[Tensor]:
    """What the operator means; its implementation on a CPU."""
    check(x, weights, biases)
    added = biases or [None] * len(weights)
    return [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, added, strict=True)]


def _cuda(x: Tensor, weights: list[Tensor], biases: Biases = None) -> list[Tensor]:
    check(x, weights, biases)
    turned = not weights[0].is_contiguous()
    found = [tiles.skinny(x.shape[0], weight.shape[0], x.shape[1], turned=turned) for weight in weights]
    alike = all((weight.t() if turned else weight).is_contiguous() for weight in weights)
    if x.dtype not in DTYPES or None in found or not alike:
        return products(x, weights, biases)
    added = list(biases or ()) or [None] * len(weights)
    vendor = "hip" if torch.version.hip else "cuda"
    x, made, kernel = x.contiguous(), [], skinny_kernel()
    for first in range(0, len(weights), kernel.WEIGHTS):
        some = weights[first : first + kernel.WEIGHTS]
        ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in some]
        fitting = tiles.skinny(x.shape[0], sum(weight.shape[0] for weight in some), x.shape[1], vendor, turned=turned)
        assert fitting is not None, "what divides each N divides their sum"
        with torch.cuda.device(x.device):
            kernel.launch_skinny(x, some, ys, *fitting, added[first : first + kernel.WEIGHTS])
        made += ys
    return made


def _fake(x: Tensor, weights: list[Tensor], biases: Biases = None) -> list[Tensor]:
    check(x, weights, biases)
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


library.impl("skinny_linear", products, "CPU")
library.impl("skinny_linear", _cuda, "CUDA")
torch.library.register_fake("graphs::skinny_linear", _fake, lib=library)


@functools.cache
def skinny_kernel() -> ModuleType:
    """The Triton kernel, imported at first use. Raises MissingDependency where triton is absent."""
    kernels()
    from graphs.ops.skinny import kernel as module

    return module


@functools.cache
def pays_on(device: torch.device) -> bool:
    """Whether the kernel was measured to be faster than the library's products on such a device: compute capability 9.0."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return importlib.util.find_spec("triton") is not None
