"""The grouped output projection as a module: a weight prepared once, one operator per call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from graphs.errors import ConfigError
from graphs.ops.wo_a import aiter_backend, auto_path, operators, reference, tuned_path, weights
from graphs.ops.wo_a.auto_path import Limits
from graphs.ops.wo_a.weights import BLOCK, PATHS, GroupedWeight

if TYPE_CHECKING:
    from graphs.environment import WoAPath

LEGAL_PATHS = (*PATHS, "auto")
BACKENDS = ("native", "aiter")
BUFFERS = {  # path -> names of the buffers that hold its weight and its scale; gloop and fused share theirs
    "einsum": ("weight", ""),
    "bmm": ("weight_single", "scale_single"),
    "gloop": ("weight_blocks", "scale_blocks"),
    "fused": ("weight_blocks", "scale_blocks"),
}


class GroupedProjection(nn.Module):
    """``y[m, g, n] = sum_k o[m, g, k] * w[g, n, k]`` with ``w`` held as one path wants it.

    Args:
        weight: ``[G, N, K]``, or ``[G*N, K]`` with ``groups``, bfloat16 or float8_e4m3fn; or the result of
            :func:`graphs.ops.from_state_dict` and its kin.
        scale: for FP8, one float32 or UE8M0 factor per 128x128 block, ``[G, N/128, K/128]`` or ``[G*N/128, K/128]``.
        path: ``einsum``, ``bmm``, ``gloop``, ``fused`` or ``auto``; ``None`` takes the configured default, which is read now and
            never again. ``auto`` picks per call by rules measured on the device (`tuned_path`) or packaged, and
            holds one form of the weight: where some calls go to ``fused``, its FP8 blocks, from which a call that goes to
            ``einsum`` makes the bfloat16 weight anew (the same bits; see below). A bfloat16 weight, or one whose N or K is no
            multiple of 128, it always gives to ``einsum``.
        groups: ``G`` of a two-dimensional weight.
        activations: path ``fused`` takes activations as they are (``bf16``) or quantises them in registers (``fp8``).
        overlap: path ``fused`` may request its weight while the kernel in front of it still runs. Right as long as no kernel
            that writes the weight is still running when this is called: the module itself waits for such kernels when it is
            built, moved or loaded. Pass ``False`` if you write its buffers in place from a kernel on the same stream.
        backend: ``native``, or ``aiter`` for the functions of AMD's package on paths ``bmm`` and ``gloop``, looked up now.

    What ``einsum`` costs under ``auto`` beside ``fused``: the weight is read in FP8, written and read in bfloat16, five bytes an
    element where a held one takes two, and 2 G N K bytes are needed while the call runs, once for all modules. Such calls are
    those of many tokens, where the product itself takes longer. Pass ``path="einsum"`` where most calls are of that kind.

    Attributes:
        path: the path as given (or configured).
        paths: the paths that calls may take: one, or several under ``auto``.
        memory: bytes of weights and scales held, by the path that uses them as they are.
        weight_bytes: their sum.

    Raises:
        ConfigError: no such path, back end or kind of activations, or a path that the back end does not have.
        MissingDependency: ``backend="aiter"`` without a usable ``amd-aiter``; the message says which release to install.
        WeightError: a weight or scale of wrong shape, dtype or values, or a path this device cannot run.
    """

    def __init__(
        self,
        weight: Tensor | GroupedWeight,
        scale: Tensor | None = None,
        path: WoAPath | None = None,
        *,
        groups: int | None = None,
        activations: Literal["bf16", "fp8"] = "bf16",
        overlap: bool = True,
        backend: Literal["native", "aiter"] = "native",
    ) -> None:
        super().__init__()
        if path is None:
            from graphs.environment import wo_a_path

            path = wo_a_path()
        if path not in LEGAL_PATHS:
            raise ConfigError("path", path, LEGAL_PATHS)
        if activations not in operators.ACTIVATIONS:
            raise ConfigError("activations", activations, operators.ACTIVATIONS)
        _check_backend(backend, path)
        loaded = weight if isinstance(weight, GroupedWeight) else weights.load(weight, scale, groups)
        device = loaded.data.device
        self.path, self.overlap, self.activations, self.backend = path, overlap, activations, backend
        self.groups, self.n, self.k = loaded.data.shape
        self._limits = self._limits_on(device)
        self.paths = _paths_to_take(path, loaded, self._limits)
        self._hold(_held_among(self.paths), loaded, device)
        _settle(self)

    def forward(self, o: Tensor, positions: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """``o [M, G, K]`` bfloat16 gives ``[M, G, N]``.

        With ``positions [M]`` and ``table [P, 64]`` the rotary embedding of ``o`` is undone first (see
        :func:`inverse_rotary`): inside the kernel on path ``fused``, by operations of their own elsewhere.
        """
        path = self.choice(o.shape[0])
        data, scale = BUFFERS[path]
        if path == "fused":
            weight, factors = getattr(self, data), getattr(self, scale)
            if positions is None and table is None and self.activations == "bf16":
                return torch.ops.graphs.wo_a_fused(o, weight, factors, self.overlap)
            return torch.ops.graphs.wo_a_fused(o, weight, factors, self.overlap, self.activations, positions, table)
        if positions is not None or table is not None:
            operators.check_activations(o, self.activations, positions, table)
            assert positions is not None and table is not None
            o = reference.inverse_rotary(o, positions, table)
        if path == "einsum":
            return torch.ops.graphs.wo_a_einsum(o, self._whole_weight())
        prefix = "wo_a_" if self.backend == "native" else "wo_a_aiter_"
        return getattr(torch.ops.graphs, prefix + path)(o, getattr(self, data), getattr(self, scale))

    def choice(self, tokens: int) -> str:
        """The path a call with ``tokens`` rows takes."""
        if len(self.paths) == 1:
            return self.paths[0]
        path = auto_path.choose(self._limits, tokens)
        return path if path in self.paths else self.paths[-1]

    def _whole_weight(self) -> Tensor:
        """The weight in bfloat16, ``[G, N, K]``: held, or made of FP8 blocks."""
        held = getattr(self, BUFFERS["einsum"][0], None)
        return held if held is not None else weights.widened(self.weight_blocks, self.scale_blocks)  # type: ignore[arg-type]

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the weight and scales that are held, by the path that uses them as they are."""
        held = dict(self.named_buffers())
        return {path: sum(held[name].nbytes for name in BUFFERS[path] if name) for path in (_held_among(self.paths),)}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights and scales held."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        """Sizes, path and bytes, for ``repr``."""
        held = ", ".join(f"{path} {size / 1e6:.3g} MB" for path, size in self.memory.items())
        backend = "" if self.backend == "native" else f", backend={self.backend!r}"
        return f"G={self.groups}, N={self.n}, K={self.k}, path={self.path!r}{backend}, holding {held}"

    def _limits_on(self, device: torch.device) -> Limits:
        return auto_path.limits_for(tuned_path.rules_for(device), self.groups) if self.path == "auto" else ((1, self.path),)

    def _hold(self, path: str, loaded: GroupedWeight, device: torch.device) -> None:
        data_name, scale_name = BUFFERS[path]
        fp8 = weights.fp8_dtype(device)
        if device.type == "cuda" and path != "einsum":
            operators.arch_of(device.index, path, fp8)
        prepared = weights.prepare(loaded, path, fp8)
        self.register_buffer(data_name, prepared.data)
        if prepared.scale is not None:
            self.register_buffer(scale_name, prepared.scale)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        _settle(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupedProjection:
        """Move between devices, keep every dtype: ``module.bfloat16()`` must not widen FP8 data or round scales."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_dtype, recurse)
        self._limits = self._limits_on(next(self.buffers()).device)
        _settle(self)
        return self


def bytes_by_path(model: object) -> dict[str, int]:
    """Bytes of the weights that every :class:`GroupedProjection` in ``model`` holds, by path, summed; empty without any."""
    total: dict[str, int] = {}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for path, size in module.memory.items() if isinstance(module, GroupedProjection) else ():
            total[path] = total.get(path, 0) + size
    return total


def _settle(module: nn.Module) -> None:
    """Wait for the kernels that wrote the weights: with ``overlap`` the first call must not meet them."""
    devices = {buffer.device for buffer in module.buffers()}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _check_backend(backend: str, path: str) -> None:
    """Raise unless ``backend`` can run ``path``; resolves the functions of ``aiter``."""
    if backend not in BACKENDS:
        raise ConfigError("backend", backend, BACKENDS)
    if backend == "aiter":
        if path not in aiter_backend.FUNCTIONS:
            raise ConfigError("path (with backend='aiter')", path, tuple(aiter_backend.FUNCTIONS))
        aiter_backend.function(path)


def _held_among(paths: tuple[str, ...]) -> str:
    """The path whose form of the weight is held: the smaller, from which the other is made."""
    return "fused" if "fused" in paths else paths[-1]


def _paths_to_take(path: str, loaded: GroupedWeight, limits: Limits) -> tuple[str, ...]:
    """The paths that calls take. ``auto`` quantises nothing: a bfloat16 weight, or one of an odd size, goes to ``einsum``."""
    if path != "auto":
        return (path,)
    _, n, k = loaded.data.shape
    if loaded.scale is None or n % BLOCK or k % BLOCK:
        return ("einsum",)
    return auto_path.candidates(limits)
