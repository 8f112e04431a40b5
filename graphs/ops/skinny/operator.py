"""The operator ``graphs::skinny_linear``: linear layers without bias that share an activation of few rows.

``x [M, K]`` and weights ``[N, K]`` of one 16-bit float dtype; the results are ``x @ weight.T``, sums in float32, rounded
once. On a GPU, where `graphs.ops.wo_a.tiles.skinny` knows a tile, one launch per three weights; a library's product per weight
elsewhere, and always on a CPU. Nothing writes this operator by hand: `passes.skinny_products` puts it into compiled steps.
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

library.define("skinny_linear(Tensor x, Tensor[] weights) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


def check(x: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise WeightError unless the operands fit together. Reads metadata only."""
    if x.dim() != 2 or not weights or any(w.dim() != 2 or w.shape[1] != x.shape[1] for w in weights):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise WeightError(f"skinny_linear: x has shape {tuple(x.shape)}, the weights {shapes}; legal are [M, K] and [N, K]")
    if any(weight.dtype != x.dtype or weight.device != x.device for weight in weights):
        raise WeightError(f"skinny_linear: the weights must be {x.dtype} on {x.device}, as x is")


def products(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """What the operator means; its implementation on a CPU."""
    check(x, weights)
    return [x @ weight.t() for weight in weights]


def _cuda(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    check(x, weights)
    found = [tiles.skinny(x.shape[0], weight.shape[0], x.shape[1]) for weight in weights]
    if x.dtype not in DTYPES or None in found or not all(weight.is_contiguous() for weight in weights):
        return [x @ weight.t() for weight in weights]
    vendor = "hip" if torch.version.hip else "cuda"
    x, made, kernel = x.contiguous(), [], skinny_kernel()
    for first in range(0, len(weights), kernel.WEIGHTS):
        some = weights[first : first + kernel.WEIGHTS]
        ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in some]
        fitting = tiles.skinny(x.shape[0], sum(weight.shape[0] for weight in some), x.shape[1], vendor)
        assert fitting is not None, "what divides each N divides their sum"
        with torch.cuda.device(x.device):
            kernel.launch_skinny(x, some, ys, *fitting)
        made += ys
    return made


def _fake(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    check(x, weights)
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
