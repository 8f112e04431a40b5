"""The operators ``graphs::mhc_*``: hyper-connections, defined by `graphs.ops.mhc.reference`.

================  ================================================  =================================================
operator          computes                                          from
================  ================================================  =================================================
``mhc_pre``       input of a block, ``post``, ``comb``              streams, linear layer, numbers
``mhc_post``      streams behind a block                            its output, streams, ``post``, ``comb``
``mhc_post_pre``  streams behind a block, input of the next,        all of these
                  ``post``, ``comb``
``mhc_head``      input of what comes behind the last block         streams, linear layer of the head, numbers
================  ================================================  =================================================

Streams are ``[..., H, D]``, a block's input and output ``[..., D]``, with the same leading dimensions. An operator raises
`WeightError` for a wrong shape, dtype or device before it launches anything, under fake tensors as well. On a GPU, where
`graphs.ops.mhc.tiles.few` knows a tile, two kernels run (one for ``mhc_post``); operators of torch elsewhere, and always on a
CPU. Nothing writes these operators by hand: `passes.hyper_connections` puts them into steps.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graphs.errors import WeightError
from graphs.ops.mhc import reference, tiles
from graphs.ops.wo_a.operators import kernels, library

MEASURED: frozenset[tuple[int, int]] = frozenset()
"""Compute capabilities on which the kernels were measured to pay. Until there is one, they are used where they are asked for."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LAYER = "Tensor fn, Tensor base, Tensor scale, float norm_eps, float eps"
_BEHIND = "Tensor out, Tensor streams, Tensor post, Tensor comb"
SCHEMAS = {
    "mhc_pre": f"(Tensor streams, {_LAYER}, int iterations) -> (Tensor, Tensor, Tensor)",
    "mhc_post": f"({_BEHIND}) -> Tensor",
    "mhc_post_pre": f"({_BEHIND}, {_LAYER}, int iterations) -> (Tensor, Tensor, Tensor, Tensor)",
    "mhc_head": f"(Tensor streams, {_LAYER}) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def check_layer(name: str, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, outputs: int, scales: int) -> None:
    """Raise WeightError unless a linear layer of ``outputs`` rows and ``scales`` scales fits the streams. Reads metadata only."""
    _check_streams(name, streams)
    hc, width = streams.shape[-2:]
    legal = ((outputs, hc * width), (outputs,), (scales,))
    if tuple(tuple(weight.shape) for weight in (fn, base, scale)) != legal:
        shapes = ", ".join(str(tuple(weight.shape)) for weight in (fn, base, scale))
        raise WeightError(
            f"{name}: streams have shape {tuple(streams.shape)}; fn, base and scale have {shapes}, legal are "
            f"{', '.join(map(str, legal))}"
        )
    for what, weight in (("fn", fn), ("base", base), ("scale", scale)):
        if weight.dtype not in DTYPES or weight.device != streams.device:
            raise WeightError(
                f"{name}: {what} is {weight.dtype} on {weight.device}; legal are torch.float32, torch.bfloat16 and "
                f"torch.float16 on {streams.device}"
            )


def check_behind(name: str, out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> None:
    """Raise WeightError unless a block's output and the weights for it fit the streams. Reads metadata only."""
    _check_streams(name, streams)
    *rows, hc, width = streams.shape
    legal = ((*rows, width), (*rows, hc), (*rows, hc, hc))
    if tuple(tuple(one.shape) for one in (out, post, comb)) != legal:
        shapes = ", ".join(str(tuple(one.shape)) for one in (out, post, comb))
        raise WeightError(
            f"{name}: streams have shape {tuple(streams.shape)}; out, post and comb have {shapes}, legal are "
            f"{', '.join(map(str, legal))}"
        )
    for what, one, dtype in (("out", out, streams.dtype), ("post", post, torch.float32), ("comb", comb, torch.float32)):
        if one.dtype != dtype or one.device != streams.device:
            raise WeightError(f"{name}: {what} is {one.dtype} on {one.device}; legal is {dtype} on {streams.device}")


def _check_streams(name: str, streams: Tensor) -> None:
    if streams.dim() < 2 or streams.dtype not in DTYPES:
        raise WeightError(
            f"{name}: streams are {streams.dtype} of shape {tuple(streams.shape)}; legal are [..., H, D] in torch.bfloat16, "
            "torch.float16 or torch.float32"
        )


def check_pre(name: str, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int) -> None:
    """Raise WeightError unless the operands of ``mhc_pre`` fit together. Reads metadata only."""
    hc = streams.shape[-2] if streams.dim() > 1 else 0
    check_layer(name, streams, fn, base, scale, (2 + hc) * hc, 3)
    if iterations < 1:
        raise WeightError(f"{name}: {iterations} iterations; legal are 1 or more")


def pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``mhc_pre`` means; its implementation on a CPU."""
    check_pre("mhc_pre", streams, fn, base, scale, iterations)
    with _as_written(streams):
        return reference.pre(streams, fn, base, scale, norm_eps, eps, iterations)


def behind(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """What ``mhc_post`` means; its implementation on a CPU."""
    check_behind("mhc_post", out, streams, post, comb)
    with _as_written(streams):
        return reference.post(out, streams, post, comb).contiguous()


def post_pre(
    out: Tensor, streams: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    norm_eps: float, eps: float, iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What ``mhc_post_pre`` means; its implementation on a CPU."""
    check_behind("mhc_post_pre", out, streams, post, comb)
    check_pre("mhc_post_pre", streams, fn, base, scale, iterations)
    with _as_written(streams):
        after = reference.post(out, streams, post, comb).contiguous()
        return after, *reference.pre(after, fn, base, scale, norm_eps, eps, iterations)


def head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    """What ``mhc_head`` means; its implementation on a CPU."""
    check_layer("mhc_head", streams, fn, base, scale, streams.shape[-2] if streams.dim() > 1 else 0, 1)
    with _as_written(streams):
        return reference.head(streams, fn, base, scale, norm_eps, eps)


def _as_written(streams: Tensor) -> AbstractContextManager[object]:
    """In float32 where the reference says so, whatever autocast the operator is called with."""
    return torch.autocast(streams.device.type, enabled=False)


def _results(streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *rows, hc, width = streams.shape
    weights = functools.partial(streams.new_empty, dtype=torch.float32)
    return streams.new_empty(*rows, width), weights((*rows, hc)), weights((*rows, hc, hc))


def _fake_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_pre("mhc_pre", streams, fn, base, scale, iterations)
    return _results(streams)


def _fake_post(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    check_behind("mhc_post", out, streams, post, comb)
    return streams.new_empty(streams.shape)


def _fake_post_pre(
    out: Tensor, streams: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    norm_eps: float, eps: float, iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_behind("mhc_post_pre", out, streams, post, comb)
    check_pre("mhc_post_pre", streams, fn, base, scale, iterations)
    return streams.new_empty(streams.shape), *_results(streams)


def _fake_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    check_layer("mhc_head", streams, fn, base, scale, streams.shape[-2] if streams.dim() > 1 else 0, 1)
    return _results(streams)[0]


def _tile(streams: Tensor) -> tiles.Tile | None:
    *_, hc, width = streams.shape
    return tiles.few(streams.numel() // max(hc * width, 1), hc, width)


def _rows(tensor: Tensor, kept: int) -> Tensor:
    """A tensor with its leading dimensions made one, contiguous."""
    return tensor.reshape(-1, *tensor.shape[tensor.dim() - kept :]).contiguous()


def _launch(
    streams: Tensor, layer: tuple[Tensor, Tensor, Tensor], numbers: tuple[float, float, int], tile: tiles.Tile,
    before: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The input of a block, ``post`` and ``comb``; first the streams that a block ``before`` leaves, where one is given."""
    results = _results(streams)
    made = streams.new_empty(streams.shape) if before is not None else streams
    flat = None if before is None else (_rows(before[0], 1), _rows(before[1], 2), _rows(before[2], 1), _rows(before[3], 2))
    layer = (layer[0].contiguous(), layer[1].contiguous(), layer[2].contiguous())
    with torch.cuda.device(streams.device):
        mhc_kernel().launch_mix(flat, _rows(made, 2), layer, numbers, results if numbers[2] else results[:1], tile)
    return results if before is None else (made, *results)


def _cuda_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, ...]:
    check_pre("mhc_pre", streams, fn, base, scale, iterations)
    tile = _tile(streams)
    if tile is None:
        return pre(streams, fn, base, scale, norm_eps, eps, iterations)
    return _launch(streams, (fn, base, scale), (norm_eps, eps, iterations), tile)


def _cuda_post(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    check_behind("mhc_post", out, streams, post, comb)
    tile = _tile(streams)
    if tile is None:
        return behind(out, streams, post, comb)
    made = streams.new_empty(streams.shape)
    with torch.cuda.device(streams.device):
        flat = (_rows(out, 1), _rows(streams, 2), _rows(post, 1), _rows(comb, 2))
        mhc_kernel().launch_spread(*flat, _rows(made, 2), tile)
    return made


def _cuda_post_pre(
    out: Tensor, streams: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    norm_eps: float, eps: float, iterations: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_behind("mhc_post_pre", out, streams, post, comb)
    check_pre("mhc_post_pre", streams, fn, base, scale, iterations)
    tile = _tile(streams)
    if tile is None:
        return post_pre(out, streams, post, comb, fn, base, scale, norm_eps, eps, iterations)
    return _launch(streams, (fn, base, scale), (norm_eps, eps, iterations), tile, (out, streams, post, comb))


def _cuda_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    check_layer("mhc_head", streams, fn, base, scale, streams.shape[-2] if streams.dim() > 1 else 0, 1)
    tile = _tile(streams)
    if tile is None:
        return head(streams, fn, base, scale, norm_eps, eps)
    return _launch(streams, (fn, base, scale), (norm_eps, eps, 0), tile)[0]


IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "mhc_pre": (pre, _cuda_pre, _fake_pre),
    "mhc_post": (behind, _cuda_post, _fake_post),
    "mhc_post_pre": (post_pre, _cuda_post_pre, _fake_post_pre),
    "mhc_head": (head, _cuda_head, _fake_head),
}
for _name, (_cpu, _cuda, _fake) in IMPLEMENTATIONS.items():
    library.impl(_name, _cpu, "CPU")
    library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"graphs::{_name}", _fake, lib=library)


@functools.cache
def mhc_kernel() -> ModuleType:
    """The Triton kernels, imported at first use. Raises MissingDependency where triton is absent."""
    kernels()
    from graphs.ops.mhc import kernel as module

    return module


@functools.cache
def pays_on(device: torch.device) -> bool:
    """Whether the kernels were measured to pay on such a device."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) not in MEASURED:
        return False
    return importlib.util.find_spec("triton") is not None
