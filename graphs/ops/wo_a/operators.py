"""The operators ``graphs::wo_a_*``: schemas, fakes, CPU reference, device kernels.

======================  ============================  ==========================================  ========
operator                weight                        scale                                       launches
======================  ============================  ==========================================  ========
``wo_a_einsum``         ``[G, N, K]`` as ``o``        none                                        1
``wo_a_bmm``            ``[G, N, K]`` FP8             float32 ``[1]``                             1
``wo_a_gloop``          ``[G, N, K]`` FP8             float32 ``[G, N/128, K/128]``               1 + G
``wo_a_fused``          ``[G, N, K]`` FP8             float32 ``[G, N/128, K/128]``               1
======================  ============================  ==========================================  ========

``o [M, G, K]`` is bfloat16 with any strides, the result ``[M, G, N]`` is contiguous and has ``o``'s dtype. An operator raises
:class:`WeightError` for a wrong shape, dtype or device before it launches anything, under fake tensors as well. Values of
scales are checked where weights are loaded, not here: reading them would stop the host and could not be recorded.

``overlap=True`` lets ``wo_a_fused`` request its weight while the kernel in front of it still runs, where the device can do that
(programmatic dependent launch). It asserts that no kernel still running writes the weight or its scales; ``o`` may be the
result of the kernel in front. ``activations="fp8"`` quantises ``o`` per token and per 128 features, in registers. ``positions
[M]`` (int32 or int64) and ``table [P, 64]`` (float32: 32 cosines, 32 sines) undo the rotary embedding of the last 64 features of
every head of 512 as ``o`` is read; every position must be below P, which is not checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graphs.errors import MissingDependency, WeightError
from graphs.ops.wo_a import reference, tiles
from graphs.ops.wo_a.reference import BLOCK, FP8_MAX, HEAD, ROTATED

ACTIVATIONS = ("bf16", "fp8")
SCHEMAS = {
    "wo_a_einsum": "(Tensor o, Tensor weight) -> Tensor",
    "wo_a_bmm": "(Tensor o, Tensor weight, Tensor scale) -> Tensor",
    "wo_a_gloop": "(Tensor o, Tensor weight, Tensor scale) -> Tensor",
    "wo_a_fused": (
        '(Tensor o, Tensor weight, Tensor scale, bool overlap=False, str activations="bf16", Tensor? positions=None, '
        "Tensor? table=None) -> Tensor"
    ),
}

library = torch.library.Library("graphs", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def check(path: str, o: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """Raise WeightError unless the operands of ``wo_a_{path}`` fit together. Reads metadata only."""
    if o.dim() != 3 or weight.dim() != 3 or o.shape[1] != weight.shape[0] or o.shape[2] != weight.shape[2]:
        raise _shape_error(path, o, weight)
    if scale is None:
        if o.dtype != weight.dtype or not o.dtype.is_floating_point or o.dtype in FP8_MAX:
            raise WeightError(
                f"wo_a_{path}: o is {o.dtype}, weight is {weight.dtype}; both must be torch.bfloat16 (or one float dtype)"
            )
    else:
        _check_quantised(path, o, weight, scale)
    if weight.device != o.device or (scale is not None and scale.device != o.device):
        where = "" if scale is None else f", scale on {scale.device}"
        raise WeightError(f"wo_a_{path}: o is on {o.device}, weight on {weight.device}{where}; all must be on the device of o")


def _check_quantised(path: str, o: Tensor, weight: Tensor, scale: Tensor) -> None:
    g, n, k = weight.shape
    if o.dtype != torch.bfloat16:
        raise WeightError(f"wo_a_{path}: o is {o.dtype}; legal is torch.bfloat16")
    if weight.dtype not in FP8_MAX:
        raise WeightError(f"wo_a_{path}: the weight is {weight.dtype}; legal are torch.float8_e4m3fn and torch.float8_e4m3fnuz")
    if scale.dtype != torch.float32:
        raise WeightError(f"wo_a_{path}: the scale is {scale.dtype}; legal is torch.float32 (UE8M0 bytes are restated at load)")
    if n % BLOCK or k % BLOCK:
        raise WeightError(f"wo_a_{path}: N = {n}, K = {k}; both must be multiples of {BLOCK}, or use wo_a_einsum")
    legal = (1,) if path == "bmm" else (g, n // BLOCK, k // BLOCK)
    if scale.shape != legal:
        raise WeightError(f"wo_a_{path}: the scale has shape {tuple(scale.shape)}; legal is {tuple(legal)}")
    if not (weight.is_contiguous() and scale.is_contiguous()):
        raise WeightError(f"wo_a_{path}: weight and scale must be contiguous; got strides {weight.stride()} and {scale.stride()}")


def check_activations(o: Tensor, activations: str, positions: Tensor | None, table: Tensor | None) -> None:
    """Raise WeightError unless the options of ``wo_a_fused`` fit ``o``. Reads metadata only."""
    if activations not in ACTIVATIONS:
        raise WeightError(f"wo_a_fused: activations is {activations!r}; legal are {', '.join(map(repr, ACTIVATIONS))}")
    if (positions is None) != (table is None):
        raise WeightError("wo_a_fused: positions and table come together; got only one of them")
    if positions is None or table is None:
        return
    if o.shape[2] % HEAD:
        raise WeightError(f"wo_a_fused: K = {o.shape[2]}; with positions it must be a multiple of {HEAD}, the features of a head")
    if positions.shape != o.shape[:1] or positions.dtype not in (torch.int32, torch.int64) or not positions.is_contiguous():
        got = f"{tuple(positions.shape)} {positions.dtype}"
        raise WeightError(f"wo_a_fused: positions is {got}; legal is a contiguous ({o.shape[0]},) of torch.int32 or torch.int64")
    if table.dim() != 2 or table.shape[1] != ROTATED or table.dtype != torch.float32 or not table.is_contiguous():
        got = f"{tuple(table.shape)} {table.dtype}"
        raise WeightError(f"wo_a_fused: the table is {got}; legal is a contiguous [P, {ROTATED}] of torch.float32")
    if positions.device != o.device or table.device != o.device:
        where = f"positions on {positions.device}, table on {table.device}"
        raise WeightError(f"wo_a_fused: o is on {o.device}, {where}; all must be on the device of o")


def _shape_error(path: str, o: Tensor, weight: Tensor) -> WeightError:
    return WeightError(
        f"wo_a_{path}: o has shape {tuple(o.shape)}, the weight {tuple(weight.shape)}; legal are o [M, G, K] and weight "
        "[G, N, K] with the same G and K"
    )


def _result(o: Tensor, weight: Tensor) -> Tensor:
    return o.new_empty((o.shape[0], o.shape[1], weight.shape[1]))


def _fake_einsum(o: Tensor, weight: Tensor) -> Tensor:
    check("einsum", o, weight, None)
    return _result(o, weight)


def _fake_bmm(o: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check("bmm", o, weight, scale)
    return _result(o, weight)


def _fake_gloop(o: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check("gloop", o, weight, scale)
    return _result(o, weight)


def _fake_fused(
    o: Tensor,
    weight: Tensor,
    scale: Tensor,
    overlap: bool = False,
    activations: str = "bf16",
    positions: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    check("fused", o, weight, scale)
    check_activations(o, activations, positions, table)
    return _result(o, weight)


def _cpu_einsum(o: Tensor, weight: Tensor) -> Tensor:
    check("einsum", o, weight, None)
    with torch._C._AutoDispatchBelowAutograd():
        return reference.project(o, weight).contiguous()


def _cpu_bmm(o: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check("bmm", o, weight, scale)
    with torch._C._AutoDispatchBelowAutograd():
        return reference.project_quantised(o, weight, scale)


def _cpu_gloop(o: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check("gloop", o, weight, scale)
    with torch._C._AutoDispatchBelowAutograd():
        return reference.project_quantised(o, weight, scale)


def _cpu_fused(
    o: Tensor,
    weight: Tensor,
    scale: Tensor,
    overlap: bool = False,
    activations: str = "bf16",
    positions: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    check("fused", o, weight, scale)
    check_activations(o, activations, positions, table)
    with torch._C._AutoDispatchBelowAutograd():
        if positions is not None and table is not None:
            o = reference.inverse_rotary(o, positions, table)
        if activations == "fp8":
            return reference.project_quantised(o, weight, scale)
        return reference.project_blocks(o, weight, scale).contiguous()


def _cuda_einsum(o: Tensor, weight: Tensor) -> Tensor:
    """One batched library GEMM that writes ``[M, G, N]`` in place: no transposed copy of the result."""
    check("einsum", o, weight, None)
    y = _result(o, weight)
    with torch._C._AutoDispatchBelowAutograd():
        torch.bmm(o.transpose(0, 1), weight.transpose(1, 2), out=y.transpose(0, 1))
    return y


def _cuda_bmm(o: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check("bmm", o, weight, scale)
    y = _result(o, weight)
    if o.shape[0]:
        arch = arch_of(o.device.index, "bmm", weight.dtype)
        m, (g, n, k) = o.shape[0], weight.shape
        few = tiles.split(m, g, n, k, arch) if m <= 8 or arch != tiles.HOPPER else None
        if few is not None:
            split_k().launch_split(o, weight, scale, y, few, fp8=True, overlap=tiles.starts_early(g * n, arch))
        else:
            kernels().launch_bmm(o, weight, scale, y, tiles.quantised_gemm("bmm", m, g, n, k, arch))
    return y


def _cuda_gloop(o: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check("gloop", o, weight, scale)
    y = _result(o, weight)
    if o.shape[0]:
        arch = arch_of(o.device.index, "gloop", weight.dtype)
        _, n, k = weight.shape
        tile = tiles.quantised_gemm("gloop", o.shape[0], 1, n, k, arch)
        kernels().launch_gloop(o, weight, scale, y, tile, overlap=tiles.overlaps(arch))
    return y


def _cuda_fused(
    o: Tensor,
    weight: Tensor,
    scale: Tensor,
    overlap: bool = False,
    activations: str = "bf16",
    positions: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    check("fused", o, weight, scale)
    plain = activations == "bf16" and positions is None and table is None
    if not plain:
        check_activations(o, activations, positions, table)
    y = _result(o, weight)
    if o.shape[0]:
        arch = arch_of(o.device.index, "fused", weight.dtype)
        _launch_fused(o, weight, scale, y, arch, plain, overlap, (activations == "fp8", positions, table))
    return y


def _launch_fused(
    o: Tensor, weight: Tensor, scale: Tensor, y: Tensor, arch: tiles.Arch, plain: bool, overlap: bool, options: tuple[Any, ...]
) -> None:
    """One of four kernels: registers and warpgroup (without options), split (few tokens), or the one for anything."""
    m, (g, n, k) = o.shape[0], weight.shape
    if plain and o.stride(2) == 1 and tiles.registers(m, g, n, k, arch):
        special = hopper()
        if special is not None:
            special.launch_registers(o, weight, scale, y, overlap)
            return
    shape = tiles.warpgroup(m, g, n, k, arch) if plain else None
    special = warpgroup() if shape is not None else None
    if special is not None and special.suits(o):
        special.launch_warpgroup(o, weight, scale, y, shape)
        return
    few = tiles.split(m, g, n, k, arch, plain)
    if few is not None:
        split_k().launch_split(o, weight, scale, y, few, *options, overlap=tiles.starts_early(g * n, arch))
        return
    fp8 = options[0]
    tile = tiles.quantised_fused(m, g, n, k, arch) if fp8 else tiles.fused(m, g, n, k, arch)
    kernels().launch_fused(o, weight, scale, y, tile, *options)


@functools.cache
def kernels() -> ModuleType:
    """The Triton kernels, imported at first use. Raises MissingDependency where triton is absent."""
    try:
        from graphs.ops.wo_a.kernels import portable as module
    except ImportError as e:
        if e.name is None or e.name.split(".")[0] != "triton":
            raise
        raise MissingDependency("triton", "the wo_a paths bmm, gloop and fused on a GPU", "pip install triton") from e
    return module


@functools.cache
def split_k() -> ModuleType:
    """The Triton kernel for few tokens. Raises MissingDependency where triton is absent."""
    kernels()
    from graphs.ops.wo_a.kernels import split_k as module

    return module


@functools.cache
def hopper() -> ModuleType | None:
    """The Gluon kernel that keeps weights in registers, or None where the installed triton lacks what it is written with."""
    try:
        from graphs.ops.wo_a.kernels import hopper as module

        module.layouts(module.WARPS)
    except (ImportError, AttributeError, TypeError):  # Gluon is experimental: names and arguments come and go
        return None
    return module


@functools.cache
def warpgroup() -> ModuleType | None:
    """The Gluon kernel that shares K over a cluster of blocks, or None where the installed triton lacks what it needs."""
    try:
        from graphs.ops.wo_a.kernels import warpgroup as module

        module.constants(BLOCK * 8, tiles.Cluster(16, 128, 2, 4))
    except (ImportError, AttributeError, TypeError):
        return None
    return module


@functools.cache
def arch_of(index: int, path: str, fp8: torch.dtype) -> tiles.Arch:
    """The architecture of device ``index``, asked once. Raises WeightError where it cannot run ``path`` with this format."""
    major, minor = torch.cuda.get_device_capability(index)
    if not torch.version.hip:
        if (major, minor) < (8, 9) or fp8 != torch.float8_e4m3fn:
            raise WeightError(
                f"wo_a_{path}: a device of compute capability {major}.{minor} does not multiply {fp8} (needs 8.9 or newer and "
                "torch.float8_e4m3fn); use path 'einsum'"
            )
        return tiles.Arch("cuda", major, minor)
    name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    if (name.startswith("gfx94")) != (fp8 == torch.float8_e4m3fnuz) or not name.startswith(("gfx94", "gfx95", "gfx12")):
        raise WeightError(
            f"wo_a_{path}: {name} does not multiply {fp8}; gfx942 takes torch.float8_e4m3fnuz, gfx950 torch.float8_e4m3fn: "
            "prepare the weight on the device it runs on, or use path 'einsum'"
        )
    return tiles.Arch("hip", major, minor)


IMPLEMENTATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "wo_a_einsum": (_cpu_einsum, _cuda_einsum, _fake_einsum),
    "wo_a_bmm": (_cpu_bmm, _cuda_bmm, _fake_bmm),
    "wo_a_gloop": (_cpu_gloop, _cuda_gloop, _fake_gloop),
    "wo_a_fused": (_cpu_fused, _cuda_fused, _fake_fused),
}
for _name, (_cpu, _cuda, _fake) in IMPLEMENTATIONS.items():
    library.impl(_name, _cpu, "CPU")
    library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"graphs::{_name}", _fake, lib=library)
