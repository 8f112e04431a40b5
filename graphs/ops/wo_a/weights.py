"""What checkpoints hold, checked once, and what each path wants, prepared once.

``load`` turns tensors as a checkpoint ships them into a :class:`GroupedWeight`; ``prepare`` turns that into the tensors one
path computes with. Everything that can be wrong with a weight is found here, before a device runs anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphs.errors import ConfigError, MissingDependency, WeightError
from graphs.ops.wo_a import reference
from graphs.ops.wo_a.reference import BLOCK, FP8_MAX

PATHS = ("einsum", "bmm", "gloop", "fused")
BLOCK_SCALED = ("gloop", "fused")
SCALE_SUFFIXES = ("weight_scale_inv", "weight_scale", "scale")
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)


@dataclass(frozen=True)
class GroupedWeight:
    """A checked weight in the checkpoint's own precision.

    Attributes:
        data: ``[G, N, K]``, bfloat16 or float8_e4m3fn.
        scale: float32 ``[G, N/128, K/128]`` for FP8 data; ``None`` for bfloat16.
    """

    data: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class PreparedWeight:
    """What one path computes with.

    Attributes:
        path: the path it was prepared for.
        data: ``[G, N, K]``: bfloat16 for ``einsum``, FP8 otherwise.
        scale: ``None`` for ``einsum``, float32 ``[1]`` for ``bmm``, float32 ``[G, N/128, K/128]`` for ``gloop`` and ``fused``.
    """

    path: str
    data: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes held: data and scales."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)


def load(weight: Tensor, scale: Tensor | None = None, groups: int | None = None) -> GroupedWeight:
    """Check the tensors of a checkpoint and bring them to ``[G, N, K]`` and ``[G, N/128, K/128]``.

    Args:
        weight: ``[G, N, K]``, or ``[G*N, K]`` together with ``groups``; bfloat16 or float8_e4m3fn.
        scale: one factor per 128x128 block, as float32 or as UE8M0 bytes (uint8 or float8_e8m0fnu). Required for FP8; a scale
            next to a bfloat16 weight is a stale index entry and is dropped with a warning.
        groups: ``G``, needed for a two-dimensional weight only.

    Raises:
        WeightError: shape, dtype or values that no path can use.
    """
    data = _grouped(weight, groups)
    if data.dtype == torch.bfloat16:
        if scale is not None:
            warnings.warn("the weight is bfloat16, so the scale that came with it is stale and is ignored", stacklevel=2)
        return GroupedWeight(data, None)
    if scale is None:
        raise WeightError(
            f"a {data.dtype} weight of shape {tuple(weight.shape)} came without a scale; it needs one float32 or UE8M0 factor "
            f"per {BLOCK}x{BLOCK} block. Only a bfloat16 weight has none."
        )
    check_multiples(data)
    blocks = _block_scales(scale, data)
    _check_no_nan(data)
    if float(_amax_blocks(data, blocks)) > torch.finfo(torch.bfloat16).max:
        raise WeightError(
            f"the dequantised weight leaves bfloat16's range: largest scale {float(blocks.max()):g}; it must be smaller"
        )
    return GroupedWeight(data, blocks)


def prepare(weight: GroupedWeight | PreparedWeight, path: str, fp8: torch.dtype = torch.float8_e4m3fn) -> PreparedWeight:
    """The tensors ``path`` computes with. Preparing what is already prepared for ``path`` returns it unchanged.

    ``gloop`` and ``fused`` use the checkpoint's data and scales as they are; ``einsum`` dequantises to bfloat16; ``bmm``
    dequantises and requantises with one scale. A bfloat16 weight needs no scale on any path: ``einsum`` takes it as it is, the
    FP8 paths quantise it here. ``fp8`` is the format of the device (:func:`fp8_dtype`).

    Raises:
        ConfigError: ``path`` is not one of ``PATHS``.
        WeightError: N or K is no multiple of 128 on an FP8 path, or the weight was prepared for a path with other tensors.
    """
    if path not in PATHS:
        raise ConfigError("path", path, PATHS)
    if isinstance(weight, PreparedWeight):
        return _again(weight, path)
    if path == "einsum":
        return PreparedWeight(path, _dequantised(weight).contiguous(), None)
    check_multiples(weight.data)
    if path == "bmm":
        return PreparedWeight(path, *reference.quantise_single(_exact(weight), fp8))
    if weight.scale is None:
        return PreparedWeight(path, *reference.quantise_blocks(_exact(weight), fp8))
    if fp8 == torch.float8_e4m3fnuz:
        return PreparedWeight(path, *to_fnuz(weight.data, weight.scale))
    return PreparedWeight(path, weight.data.contiguous(), weight.scale.contiguous())


def widened(data: Tensor, scale: Tensor) -> Tensor:
    """The bfloat16 weight ``[G, N, K]`` that FP8 blocks stand for: the bits that `prepare` gives ``einsum``, rounded once.

    ``data [G, N, K]`` FP8, ``scale [G, N/128, K/128]`` float32. An FP8 number is exact in bfloat16, so no float32 copy is made.
    """
    g, n, k = data.shape
    wide = data.to(torch.bfloat16)
    wide.view(g, n // BLOCK, BLOCK, k // BLOCK, BLOCK).mul_(scale[:, :, None, :, None])
    return wide


def fp8_dtype(device: torch.device | str) -> torch.dtype:
    """The FP8 format ``device`` multiplies natively: e4m3fnuz on gfx940..gfx942, e4m3fn elsewhere."""
    device = torch.device(device)
    hip = device.type == "cuda" and torch.version.hip
    if hip and torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94"):
        return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn


def to_fnuz(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Re-tag e4m3fn as e4m3fnuz without rounding: the same bits mean half there, so every scale doubles.

    The byte 0x80, minus zero in e4m3fn and NaN in e4m3fnuz, becomes plain zero. Raises WeightError if a doubled scale overflows.
    """
    if data.dtype == torch.float8_e4m3fnuz:
        return data, scale
    doubled = scale * 2
    if not bool(torch.isfinite(doubled).all()):
        raise WeightError(
            f"doubling the scale for e4m3fnuz overflows float32: largest {float(scale.max()):g}, at most 1.7e38 is legal"
        )
    bits = data.view(torch.uint8)
    return bits.where(bits != 0x80, torch.zeros_like(bits)).view(torch.float8_e4m3fnuz), doubled


def from_ue8m0(scale: Tensor) -> Tensor:
    """Restate UE8M0 bytes as float32: ``2 ** (byte - 127)``, exact for every byte; 255 is NaN in the format."""
    bits = scale.view(torch.uint8).to(torch.int32)
    normal = (bits << 23).view(torch.float32)
    exact = torch.where(bits == 0, torch.full_like(normal, 2.0**-127), normal)
    return torch.where(bits == 255, torch.full_like(normal, float("nan")), exact)


def to_ue8m0(scale: Tensor) -> Tensor | None:
    """Restate float32 scales as UE8M0 bytes (uint8) if every one is a power of two in range, else ``None``: never rounded."""
    bits = scale.float().view(torch.int32)
    bytes_ = torch.where(bits == 0x00400000, torch.zeros_like(bits), bits >> 23)  # 2**-127 is subnormal in float32
    exact = bytes_.clamp(0, 254).to(torch.uint8)
    return exact if bool((from_ue8m0(exact) == scale).all()) else None


def path_bytes(groups: int, n: int, k: int) -> dict[str, int]:
    """Bytes of weight and scales per path for ``[G, N, K]``."""
    elements, blocks = groups * n * k, groups * (n // BLOCK) * (k // BLOCK)
    return {"einsum": 2 * elements, "bmm": elements + 4, "gloop": elements + 4 * blocks, "fused": elements + 4 * blocks}


def from_state_dict(state: Mapping[str, Tensor], name: str, groups: int | None = None) -> GroupedWeight:
    """Load ``{name}.weight`` and its scale from a state dict.

    The scale is looked for under ``weight_scale_inv``, ``weight_scale`` and ``scale``. Raises WeightError without a weight.
    """
    key = f"{name}.weight" if name else "weight"
    if key not in state:
        raise WeightError(f"{key!r} is not in the state dict; it has {_some(state)}")
    prefix = key[: -len("weight")]
    scale = next((state[prefix + s] for s in SCALE_SUFFIXES if prefix + s in state), None)
    return load(state[key], scale, groups)


def from_safetensors(path: str | Path, name: str, groups: int | None = None, device: str = "cpu") -> GroupedWeight:
    """Load ``{name}.weight`` and its scale from one safetensors file, reading no other tensor of it."""
    try:
        from safetensors import safe_open
    except ImportError as e:
        raise MissingDependency("safetensors", "loading a checkpoint file", "pip install safetensors") from e
    prefix = f"{name}." if name else ""
    with safe_open(str(path), framework="pt", device=device) as file:
        wanted = [prefix + s for s in ("weight", *SCALE_SUFFIXES)]
        present = set(file.keys())
        state = {key: file.get_tensor(key) for key in wanted if key in present}
        if prefix + "weight" not in present:
            raise WeightError(f"{prefix + 'weight'!r} is not in {path}; it has {_some(present)}")
    return from_state_dict(state, name, groups)


def check_multiples(data: Tensor) -> None:
    """Raise WeightError unless N and K of ``[G, N, K]`` are multiples of 128."""
    _, n, k = data.shape
    if n % BLOCK or k % BLOCK:
        raise WeightError(
            f"N = {n}, K = {k}: paths with an FP8 weight (bmm, gloop, fused) need positive multiples of {BLOCK} for both; "
            "path 'einsum' with a bfloat16 weight takes any size"
        )


def _grouped(weight: Tensor, groups: int | None) -> Tensor:
    if weight.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        raise WeightError(f"the weight is {weight.dtype}; legal are torch.bfloat16 and torch.float8_e4m3fn")
    shape = tuple(weight.shape)
    if weight.dim() not in (2, 3) or 0 in shape:
        raise WeightError(f"the weight has shape {shape}; legal are [G, N, K] and, with groups=G, [G*N, K]")
    if weight.dim() == 3:
        if groups not in (None, shape[0]):
            raise WeightError(f"groups = {groups} contradicts the weight's shape {shape}; leave it out or pass {shape[0]}")
        return weight
    if groups is None or groups < 1 or shape[0] % groups:
        raise WeightError(f"a weight of shape {shape} [G*N, K] needs groups=G, a divisor of {shape[0]}; got {groups}")
    return weight.reshape(groups, shape[0] // groups, shape[1])


def _block_scales(scale: Tensor, data: Tensor) -> Tensor:
    g, n, k = data.shape
    grouped, flat = (g, n // BLOCK, k // BLOCK), (g * n // BLOCK, k // BLOCK)
    if tuple(scale.shape) not in (grouped, flat):
        raise WeightError(
            f"the scale has shape {tuple(scale.shape)}; for a weight {list(data.shape)} legal are {list(grouped)} and "
            f"{list(flat)}"
        )
    if scale.dtype not in (torch.float32, torch.uint8, E8M0):
        raise WeightError(f"the scale is {scale.dtype}; legal are torch.float32, torch.uint8 (UE8M0) and torch.float8_e8m0fnu")
    if scale.device != data.device:
        raise WeightError(f"the scale is on {scale.device}, the weight on {data.device}; they must be on one device")
    values = scale if scale.dtype == torch.float32 else from_ue8m0(scale)
    bad = ~(torch.isfinite(values) & (values > 0))
    if bool(bad.any()):
        first = float(values[bad][0])
        raise WeightError(f"{int(bad.sum())} of {values.numel()} scales are not positive finite numbers, the first is {first}")
    return values.reshape(grouped)


def _check_no_nan(data: Tensor) -> None:
    count = int(((data.view(torch.uint8) & 0x7F) == 0x7F).sum())
    if count:
        raise WeightError(f"the FP8 weight holds {count} NaN of {data.numel()} values; legal are finite values only")


def _amax_blocks(data: Tensor, blocks: Tensor) -> Tensor:
    g, n, k = data.shape
    per_block = data.float().abs().reshape(g, n // BLOCK, BLOCK, k // BLOCK, BLOCK).amax((2, 4))
    return (per_block.double() * blocks.double()).max()


def _exact(weight: GroupedWeight) -> Tensor:
    if weight.scale is not None:
        return reference.dequantise_blocks(weight.data, weight.scale)
    if not bool(torch.isfinite(weight.data).all()):
        raise WeightError("the bfloat16 weight holds NaN or Inf, which cannot be quantised; legal are finite values only")
    return weight.data.float()


def _dequantised(weight: GroupedWeight) -> Tensor:
    return weight.data if weight.scale is None else _exact(weight).to(torch.bfloat16)


def _again(weight: PreparedWeight, path: str) -> PreparedWeight:
    if weight.path == path:
        return weight
    if weight.path in BLOCK_SCALED and path in BLOCK_SCALED:
        return PreparedWeight(path, weight.data, weight.scale)
    raise WeightError(
        f"a weight prepared for {weight.path!r} cannot serve {path!r}; prepare the checkpoint's tensors for {path!r}"
    )


def _some(keys: Mapping[str, Tensor] | set[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no tensors"


__all__ = [
    "BLOCK",
    "BLOCK_SCALED",
    "FP8_MAX",
    "PATHS",
    "GroupedWeight",
    "PreparedWeight",
    "fp8_dtype",
    "from_safetensors",
    "from_state_dict",
    "from_ue8m0",
    "load",
    "path_bytes",
    "prepare",
    "to_fnuz",
    "to_ue8m0",
    "widened",
]
