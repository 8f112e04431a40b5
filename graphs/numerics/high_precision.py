"""One eager run of a step with a second one beside it, in float64: what its results would be without rounding.

`HighPrecision` runs every operator as eager does and, where floating-point numbers are involved, once more in float64 on
*shadows*. A shadow belongs to a storage, not to a tensor: a view finds its part of it by its own sizes, strides and offset,
and an in-place write goes to the same place of the shadow. A storage that nothing has computed (a weight, an argument) has
no shadow; it is cast where it is read, and the cast is dropped behind the operator. A shadow goes when its storage does.

Integers, booleans and what the host reads are those of the eager run, so that branches, indices and routing are eager's
too: the shadow of ``topk`` holds the values at eager's indices. Where an operator cannot run in float64, its results are
taken from eager, and `HighPrecision.gaps` says so: behind a gap the shadows know nothing of what was rounded before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from graphs.numerics.precise_operators import DECISIONS, DRAWS, FOREIGN, MOVES, PRECISE, UNINITIALISED, CannotRaise
from graphs.numerics.ties import Tie, find_ties, is_choice, turn
from graphs.state.regions import Region
from graphs.state.storage import RESIZING, storage_id, tensors_in, written_tensors
from passes.core.composites import DispatchMode
from passes.core.schema import is_mutable

Tensor = torch.Tensor
aten = torch.ops.aten
_FLOAT8 = frozenset(dtype for name, dtype in vars(torch).items() if name.startswith("float8") and isinstance(dtype, torch.dtype))
_SWEEP = 16  # operators between two looks for shadows whose storage is gone


def raised(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a shadow: float64, complex128, or ``dtype`` itself where it is exact."""
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype


def _rounds(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout is torch.strided


@dataclass(frozen=True)
class _Shadow:
    """The numbers of one storage, flat, as elements of ``dtype`` would lie in it."""

    flat: Tensor
    dtype: torch.dtype
    storage: StorageWeakRef

    def part(self, tensor: Tensor) -> Tensor:
        """What ``tensor`` views, to be read or written."""
        flat = self.flat
        if tensor.is_complex() and not flat.is_complex():
            flat = torch.view_as_complex(flat[: flat.numel() // 2 * 2].view(-1, 2))
        elif flat.is_complex() and not tensor.is_complex():
            flat = torch.view_as_real(flat).view(-1)
        part = flat.as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        part = part.conj() if tensor.is_conj() else part
        return part._neg_view() if tensor.is_neg() else part


class HighPrecision(DispatchMode):
    """Runs eager, and what eager rounds once more in float64.

    Attributes:
        gaps: operators whose results were taken from eager although what they read was rounded, and why.
        ties: choices of eager's that rounding may have decided, the closest first.

    Args:
        turned: ties in which eager is made to choose the other one, one after the other.
        seed: of random numbers by which each result is rounded, as if in its dtype, for another sample of eager's error.
    """

    def __init__(self, turned: Sequence[Tie] = (), seed: int | None = None) -> None:
        super().__init__()
        self._seed, self._generators = seed, dict[torch.device, torch.Generator]()
        self.gaps: dict[str, str] = {}
        self._turned, self._choices, self._ties = turned, 0, list[Tie]()
        self._shadows: dict[int, _Shadow] = {}
        self._count = 0

    @property
    def ties(self) -> list[Tie]:  # noqa: D102
        return sorted(self._ties, key=lambda tie: tie.margin)

    @property
    def held(self) -> int:
        """Bytes of the shadows that are alive."""
        self._sweep()
        return sum(shadow.flat.nbytes for shadow in self._shadows.values())

    def of(self, tensor: Tensor) -> Tensor:
        """The numbers of ``tensor`` before rounding, float64 or complex128: a part of its shadow, or else itself cast."""
        with torch.inference_mode(False), torch.no_grad():
            shadow = self._shadow(tensor)
            return shadow.part(tensor) if shadow is not None else _cast(tensor)

    def of_region(self, region: Region) -> Tensor:
        """As `of`, for what an operator wrote."""
        with torch.inference_mode(False), torch.no_grad():
            shadow = self._shadow(region.tensor)
            return region.entries_of(shadow.part(region.tensor)) if shadow is not None else _cast(region.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # under inference_mode composite operators arrive whole
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        self._count += 1
        if self._count % _SWEEP == 0:
            self._sweep()
        written = written_tensors(func, args, kwargs)
        return self._write(func, args, kwargs, written) if written else self._make(func, args, kwargs)

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator that writes nothing: eager first, and float64 only if something rounded came of it."""
        result = func(*args, **kwargs)
        given = tensors_in([args, kwargs])
        if is_choice(func) and self._rounded(given):
            self._choose(func, args, kwargs, result)
        storages = {storage_id(tensor) for tensor in given if tensor.layout is torch.strided}
        made = [t for t in tensors_in(result) if _rounds(t) and storage_id(t) not in storages]
        if not made or not given or self._as_eager(func, given, made):
            return result
        with _precisely():
            precise = self._run(func, self._lift(args, ()), self._lift(kwargs, ()), result, given)
            for mine, theirs in zip(tensors_in(result), tensors_in(precise), strict=False):
                if any(mine is tensor for tensor in made) and theirs is not None:
                    moved = func.overloadpacket in MOVES
                    self._keep(mine, theirs if self._seed is None or moved else self._noisy(theirs, mine.dtype))
        return result

    def _write(self, func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """An operator that writes: the shadows of what it reads are taken before."""
        given = tensors_in([args, kwargs])
        exact = func in RESIZING or not any(map(_rounds, written)) or self._as_eager(func, given, written)
        if exact:
            result = func(*args, **kwargs)
            self._refresh(written)
            return result
        with _precisely():
            lifted = self._lift(args, written), self._lift(kwargs, written)
        result = func(*args, **kwargs)
        with _precisely():
            before = len(self.gaps)
            self._run(func, *lifted, result, given)
            if len(self.gaps) > before:
                self._refresh(written)
        return result

    def _choose(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note the ties of a choice, and turn those that are to be turned."""
        turn(func, args, kwargs, result, [tie for tie in self._turned if tie.choice == self._choices])
        with _precisely():
            self._ties += find_ties(func, args, kwargs, result, self.of(args[0]), self._choices)
        self._choices += 1

    def _run(self, func: Any, args: Any, kwargs: Any, result: Any, given: Sequence[Tensor]) -> Any:
        """The operator in float64; None where it cannot run so, which is a gap if what it reads was rounded."""
        try:
            precise = PRECISE.get(func.overloadpacket) or FOREIGN.get(func._schema.name)
            if precise is None and func.namespace not in ("aten", "prims"):
                raise CannotRaise("not an operator of ATen")
            return precise(func, args, kwargs, result) if precise is not None else func(*args, **kwargs)
        except Exception as error:  # kernels for some dtypes only, no room: whatever it is, eager's numbers take over
            if self._rounded(given):
                self.gaps.setdefault(str(func), f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            return None

    def _as_eager(self, func: Any, given: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
        """Whether eager's result is exact as it is: a decision, a draw, memory moved that nothing has rounded."""
        packet = func.overloadpacket
        if packet in UNINITIALISED or packet in DECISIONS or packet in DRAWS:
            return True
        if packet in MOVES and not self._rounded(given):
            return not is_mutable(func)
        seeded = torch.Tag.nondeterministic_seeded in func.tags and packet not in PRECISE
        if (seeded or any(t.dtype in _FLOAT8 for t in results)) and self._rounded(given):
            self.gaps.setdefault(str(func), "it draws random numbers" if seeded else "it rounds to 8 bits")
            return True
        return seeded

    def _rounded(self, tensors: Sequence[Tensor]) -> bool:
        return any(_rounds(tensor) and storage_id(tensor) in self._shadows for tensor in tensors)

    def _lift(self, value: Any, written: Sequence[Tensor]) -> Any:
        """An argument for the run in float64. What is written gets a shadow to be written to."""
        if isinstance(value, Tensor):
            if not _rounds(value):
                return value
            if any(value is tensor for tensor in written):
                self._cover(value)
            return self.of(value)
        if isinstance(value, torch.dtype):
            return raised(value)
        if isinstance(value, (tuple, list)):
            return type(value)(self._lift(item, written) for item in value)
        return {key: self._lift(item, written) for key, item in value.items()} if isinstance(value, dict) else value

    def _shadow(self, tensor: Tensor) -> _Shadow | None:
        if not _rounds(tensor):
            return None
        shadow = self._shadows.get(storage_id(tensor))
        if shadow is None or shadow.dtype == tensor.dtype or shadow.dtype.to_real() == tensor.dtype.to_real():
            return shadow
        del self._shadows[storage_id(tensor)]  # the same bits seen as other numbers
        self.gaps.setdefault("aten.view.dtype", f"memory of {shadow.dtype} is read as {tensor.dtype}")
        return None

    def _cover(self, tensor: Tensor) -> None:
        """Give the whole storage of ``tensor`` a shadow of its own."""
        if self._shadow(tensor) is None:
            self._hold(tensor, _whole(tensor).to(raised(tensor.dtype), copy=True))

    def _keep(self, tensor: Tensor, precise: Tensor) -> None:
        """Let ``precise`` be the numbers of ``tensor``, which has just been made."""
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        target = raised(tensor.dtype)
        alike = precise.stride() == tensor.stride() and tensor.storage_offset() == precise.storage_offset() == 0
        if alike and precise.dtype is target and precise.untyped_storage().nbytes() == count * precise.element_size():
            self._hold(tensor, precise.as_strided((count,), (1,), 0))
            return
        flat = torch.zeros(count, dtype=target, device=tensor.device)
        flat.as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset())).copy_(precise)
        self._hold(tensor, flat)

    def _hold(self, tensor: Tensor, flat: Tensor) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        self._shadows[storage_id(tensor)] = _Shadow(flat, tensor.dtype, storage)

    def _noisy(self, precise: Tensor, dtype: torch.dtype) -> Tensor:
        """As far from ``precise`` as rounding to ``dtype`` may be."""
        generator = self._generators.get(precise.device)
        if generator is None:
            generator = self._generators[precise.device] = torch.Generator(precise.device).manual_seed(self._seed or 0)
        real = torch.float64  # of a complex number both parts alike
        draw = torch.rand(precise.shape, dtype=real, device=precise.device, generator=generator)
        return precise * (1 + torch.finfo(dtype).eps * (draw - 0.5))

    def _refresh(self, tensors: Sequence[Tensor]) -> None:
        """Take over what eager wrote, in the places that it wrote."""
        with _precisely():
            for tensor in tensors:
                known = self._shadows.get(storage_id(tensor)) if tensor.layout is torch.strided else None
                shadow = self._shadow(tensor) if known is not None else None
                count = tensor.untyped_storage().nbytes() // tensor.element_size() if known is not None else 0
                if shadow is not None and shadow.dtype == tensor.dtype and shadow.flat.numel() == count:
                    shadow.part(tensor).copy_(tensor)
                elif known is not None:  # written as integers, or resized
                    self._shadows.pop(storage_id(tensor), None)

    def _sweep(self) -> None:
        self._shadows = {key: shadow for key, shadow in self._shadows.items() if not shadow.storage.expired()}


class _precisely:  # noqa: N801
    """What shadows are computed under: no gradients, tensors that anybody may write, no autocast."""

    def __enter__(self) -> None:
        self._inference, self._grad = torch.inference_mode(False), torch.no_grad()
        self._inference.__enter__()
        self._grad.__enter__()
        self._autocast = torch._C._DisableAutocast()
        self._autocast.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._autocast.__exit__(*error)
        self._grad.__exit__(*error)
        self._inference.__exit__(*error)


def _cast(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().to(raised(tensor.dtype))


def _whole(tensor: Tensor) -> Tensor:
    """The whole storage of ``tensor``, flat."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), 0, (count,), (1,))  # type: ignore[call-overload, no-any-return]
