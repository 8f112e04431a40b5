"""The operator ``graphs::skinny_linear``: linear layers that share an activation of few rows.

``x [M, K]``, weights ``[N, K]`` and, if any, a bias ``[N]`` or None for each, of one 16-bit float dtype; the results are ``x @
weight.T + bias``, sums in float32 with the bias among them, rounded once. The weights lie as they are or all transposed. On a
GPU, where `graphs.ops.wo_a.tiles.skinny` knows a tile, one launch per three weights; a library's product per weight elsewhere,
and always on a CPU.

``norm`` is of the rows of ``x`` before the products, over all K: ``"rms"``, ``x / sqrt(mean(x**2) + eps) * gain``, or
``"layer"``, where the mean is taken off first and ``shift`` added at last; ``gain`` and ``shift`` are ``[K]``, of the dtype of
``x`` or float32. It is float32 inside and rounded once. Behind the products, which are rounded as they are without, stands one
of two: ``residual [M, N]``, which is added to that of one weight; or ``activation``, of that of one weight, or of that of the
first of two, which is rounded and multiplied with that of the second. There is one result then.

Nothing writes this operator by hand: `passes.skinny_products`,
`passes.norm_prologues` and `passes.product_epilogues` put it into compiled steps.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphs.errors import WeightError
from graphs.ops.skinny.around import Around
from graphs.ops.wo_a import tiles
from graphs.ops.wo_a.operators import kernels, library

DTYPES = (torch.bfloat16, torch.float16)

NORMS = ("none", "rms", "layer")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
}

library.define(
    'skinny_linear(Tensor x, Tensor[] weights, Tensor?[]? biases=None, str norm="none", Tensor? gain=None, Tensor? shift=None, '
    'float eps=0.0, str activation="none", Tensor? residual=None) -> Tensor[]',
    tags=(torch.Tag.pt2_compliant_tag,),
)
Biases = Sequence[Tensor | None] | None


def check(x: Tensor, weights: Sequence[Tensor], biases: Biases = None, around: Around = Around()) -> None:  # noqa: B008
    """Raise WeightError unless the operands fit together. Reads metadata only."""
    if x.dim() != 2 or not weights or any(w.dim() != 2 or w.shape[1] != x.shape[1] for w in weights):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise WeightError(f"skinny_linear: x has shape {tuple(x.shape)}, the weights {shapes}; legal are [M, K] and [N, K]")
    if any(weight.dtype != x.dtype or weight.device != x.device for weight in weights):
        raise WeightError(f"skinny_linear: the weights must be {x.dtype} on {x.device}, as x is")
    if biases and len(biases) != len(weights):
        raise WeightError(f"skinny_linear: {len(biases)} biases for {len(weights)} weights; legal are none or one for each")
    for bias, weight in zip(biases or (), weights, strict=False):
        if bias is not None:
            _require("a bias", bias, weight.shape[:1], (x.dtype,), x.device)
    _check_norm(x, around)
    _check_behind(x, weights, around)


def _require(what: str, given: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    if tuple(given.shape) != tuple(shape) or given.dtype not in dtypes or given.device != device:
        legal = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise WeightError(
            f"skinny_linear: {what} has shape {tuple(given.shape)} and is {given.dtype} on {given.device}; legal is "
            f"{tuple(shape)}, {legal} on {device}"
        )


def _check_norm(x: Tensor, around: Around) -> None:
    if around.norm not in NORMS:
        raise WeightError(f"skinny_linear: norm is {around.norm!r}; legal are {', '.join(map(repr, NORMS))}")
    wanted = {"none": (False, False), "rms": (True, False), "layer": (True, around.shift is not None)}[around.norm]
    if (around.gain is not None, around.shift is not None) != wanted:
        raise WeightError(
            "skinny_linear: 'rms' takes a gain and no shift, 'layer' a gain and perhaps a shift, 'none' neither; got norm "
            f"{around.norm!r} {'with' if around.gain is not None else 'without'} a gain and "
            f"{'with' if around.shift is not None else 'without'} a shift"
        )
    for what, given in (("the gain", around.gain), ("the shift", around.shift)):
        if given is not None:
            _require(what, given, x.shape[1:], (x.dtype, torch.float32), x.device)


def _check_behind(x: Tensor, weights: Sequence[Tensor], around: Around) -> None:
    if around.activation == "none" and around.residual is None:
        return
    if around.activation != "none":
        if around.activation not in ACTIVATIONS:
            legal = ", ".join(map(repr, ("none", *ACTIVATIONS)))
            raise WeightError(f"skinny_linear: activation is {around.activation!r}; legal are {legal}")
        sizes = [weight.shape[0] for weight in weights]
        if around.residual is not None or len(sizes) > 2 or any(size != sizes[0] for size in sizes):
            raise WeightError(
                f"skinny_linear: weights of {sizes} rows{' and a residual' if around.residual is not None else ''}; with an "
                "activation, legal are one weight, or two of one shape whose products are multiplied, and no residual"
            )
    elif len(weights) > 1:
        raise WeightError(f"skinny_linear: {len(weights)} weights and a residual; legal is one")
    else:
        _require("the residual", around.residual, (x.shape[0], weights[0].shape[0]), (x.dtype,), x.device)  # type: ignore[arg-type]


def products(x: Tensor, weights: list[Tensor], biases: Biases = None, *options: Any, **named: Any) -> list[Tensor]:
    """What the operator means; its implementation on a CPU."""
    around = Around(*options, **named)
    check(x, weights, biases, around)
    added = biases or [None] * len(weights)
    with torch.autocast(x.device.type, enabled=False):
        rows = normed(x, around)
        made = [functional.linear(rows, weight, bias) for weight, bias in zip(weights, added, strict=True)]
        if around.residual is not None:
            return [made[0] + around.residual]
        if around.activation == "none":
            return made
        active = ACTIVATIONS[around.activation](made[0].float()).to(x.dtype)
        return [active * made[1] if len(made) > 1 else active]


def normed(x: Tensor, around: Around) -> Tensor:
    """The rows of ``x`` as they are multiplied: rounded once, whatever the norm."""
    if around.gain is None:
        return x
    wide, gain = x.float(), around.gain.float()
    if around.norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + around.eps) * gain
    return (wide if around.shift is None else wide + around.shift.float()).to(x.dtype)


def _cuda(x: Tensor, weights: list[Tensor], biases: Biases = None, *options: Any, **named: Any) -> list[Tensor]:
    around = Around(*options, **named)
    check(x, weights, biases, around)
    turned = not all(weight.is_contiguous() for weight in weights)
    found = [tiles.skinny(x.shape[0], weight.shape[0], x.shape[1], turned=turned) for weight in weights]
    alike = all((weight.t() if turned else weight).is_contiguous() for weight in weights)
    if x.dtype not in DTYPES or None in found or not alike:
        return products(x, weights, biases, *around)
    added = [_dense(bias) for bias in biases or [None] * len(weights)]
    vendor = "hip" if torch.version.hip else "cuda"
    around = around._replace(gain=_dense(around.gain), shift=_dense(around.shift), residual=_dense(around.residual))
    x, made, kernel = x.contiguous(), [], skinny_kernel()
    gated = around.activation != "none" and len(weights) > 1
    for first in range(0, len(weights), kernel.WEIGHTS):
        some = weights[first : first + kernel.WEIGHTS]
        ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in (some[:1] if gated else some)]
        columns = sum(weight.shape[0] for weight in some)
        fitting = tiles.skinny(x.shape[0], columns, x.shape[1], vendor, turned=turned, gated=gated)
        assert fitting is not None, "what divides each N divides their sum"
        with torch.cuda.device(x.device):
            kernel.launch_skinny(x, some, ys, *fitting, added[first : first + kernel.WEIGHTS], around, turned=turned)
        made += ys
    return made


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _fake(x: Tensor, weights: list[Tensor], biases: Biases = None, *options: Any, **named: Any) -> list[Tensor]:
    around = Around(*options, **named)
    check(x, weights, biases, around)
    results = weights if around.activation == "none" else weights[:1]
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in results]


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
