"""Torch's Python entry points that turn symbols, or tensors, into plain numbers: what a traced step calls in their place.

They are functions of Python and of the argument parser, above any operator: ``torch.tensor([u, 1])``, ``x[u]``,
``F.pad(x, (0, u))``, ``t.cpu()``, ``torch.equal(a, b)``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from passes.control_flow.stopping import inside
from passes.core.composites import called
from passes.core.modes.patched_functions import as_torch_made
from passes.core.predicates import is_iteration
from passes.core.source_location import user_site
from passes.core.symbols import SYMBOLS
from passes.errors import Unremovable
from passes.tracing.reading_order import reading_order
from passes.tracing.torch_symbols import FakeTensor

Tensor = torch.Tensor
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_TO_HOST = {
    getattr(Tensor, name): name
    for name in ("numpy", "__array__", "__repr__", "__format__", "__dlpack__", "__reduce_ex__")
}  # fmt: skip
Arguments = tuple[Any, ...]
Entry = Callable[[Any, Arguments, dict[str, Any]], Any]
"""Takes the function and its arguments; returns its result, or ``NotImplemented`` where torch's own will do."""


class SymbolicEntry(TorchFunctionMode):
    """Keeps symbols where torch's Python entry points would turn them, or tensors, into plain numbers.

    Args:
        drop: told the name of a read that the eager run made and the traced one does without.
        rows: gives the rows of a tensor to a Python loop over it, or ``NotImplemented``.
    """

    def __init__(self, drop: Callable[[str], None], rows: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self._drop, self._rows = drop, rows

    def __torch_function__(self, func: Any, types: Any, args: Arguments = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call the symbolic version of ``func`` if there is one for these arguments, else ``func``."""
        func = as_torch_made(func, sys._getframe(1))
        with inside(func, args):
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
        if func is Tensor.cpu or (func is Tensor.to and _names_the_host(args[1:], kwargs)):
            return _to_host(args, kwargs)
        if func is Tensor.unbind and is_iteration() and (rows := self._rows(args[0])) is not NotImplemented:
            return rows
        if func in _EQUAL and args[0].shape != args[1].shape:
            self._drop(str(torch.ops.aten.equal.default))
            return False
        entry = _ENTRIES.get(func)
        made = entry(func, args, kwargs) if entry is not None else NotImplemented
        if made is not NotImplemented:
            return made
        with called(func):
            return func(*args, **kwargs)


def _to_host(args: Arguments, kwargs: dict[str, Any]) -> Tensor:
    """``x.cpu()``, ``x.to("cpu", dtype)``: the step stays on the device. From another device it is a copy, on the host not."""
    x, dtypes = args[0], [value for value in args[1:] if isinstance(value, torch.dtype)]
    settings = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
    return (x.clone() if x.device.type != "cpu" else x).to(*dtypes, **settings)


def _names_the_host(args: Arguments, kwargs: dict[str, Any]) -> bool:
    target = kwargs.get("device", args[0] if args else None)
    return isinstance(target, (str, torch.device)) and torch.device(target).type == "cpu"


def _from_list(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``torch.tensor([u, 1])``, ``x.new_tensor([u, 1])`` and their like."""
    data = args[-1] if args else kwargs.get("data", kwargs.get("obj"))
    if isinstance(data, Tensor) or not has_symbols(data):
        return NotImplemented
    return tensor_of(data, args[0] if len(args) > 1 else None, kwargs)


def has_symbols(data: Any) -> bool:
    """Whether nested lists hold a symbol, or a tensor that stands for its value."""
    if isinstance(data, (list, tuple)):
        return any(map(has_symbols, data))
    return isinstance(data, (*SYMBOLS, Tensor))


def tensor_of(data: Any, like: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """``torch.tensor(data)`` where some of the numbers are symbols, or tensors that stand for their values.

    Args:
        like: tensor that dtype and device come from where ``kwargs`` does not name them.
    """
    if isinstance(data, (list, tuple)):
        return torch.stack([tensor_of(item, like, kwargs) for item in data])
    value = data.item() if isinstance(data, Tensor) else data
    kind = torch.get_default_dtype() if isinstance(value, (float, torch.SymFloat)) else torch.int64
    dtype = kwargs.get("dtype") or (like.dtype if like is not None else kind)
    device = kwargs.get("device") or (like.device if like is not None else None)
    if isinstance(value, (bool, torch.SymBool)):
        value, dtype = torch.sym_ite(value, 1, 0) if isinstance(value, torch.SymBool) else value, torch.bool
    return torch.scalar_tensor(value, dtype=dtype, device=device)


def _unbind(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Rows of a tensor whose length is a symbol, which is taken at its value."""
    x, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not isinstance(x.shape[dim], torch.SymInt):
        return NotImplemented
    return tuple(x.select(dim, row) for row in range(int(x.shape[dim])))


def _numpy(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Whole numbers as a NumPy array of symbols."""
    import numpy as np

    x = args[0]
    if x.dtype not in _WHOLE:
        return _needed_by_host(func, args, kwargs)
    array: Any = np.empty(tuple(x.shape), dtype=object)
    for place in np.ndindex(*array.shape):
        array[place] = x[place].item()
    return array


def traced_tensor(x: Tensor) -> Tensor:
    """``x``, or where it is a tensor that the step holds itself, an alias of it that is traced.

    `make_fx` takes the value of a tensor that nothing traced has made for a constant, and would freeze it.
    """
    return x if isinstance(x, FakeTensor) else torch.ops.aten.alias.default(x)


def _tolist(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Numbers of a tensor that the step holds itself, which torch would read from its memory."""
    return NotImplemented if isinstance(args[0], FakeTensor) else traced_tensor(args[0]).tolist()


def _needed_by_host(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    raise Unremovable("the host needs the tensor itself", f"Tensor.{_TO_HOST[func]}", user_site())


def _equal(func: Any, args: Arguments, kwargs: dict[str, Any]) -> bool:
    a, b = args
    with called(Tensor.__bool__):
        return bool(torch.eq(a, b).all())


def _allclose(func: Any, args: Arguments, kwargs: dict[str, Any]) -> bool:
    with called(Tensor.__bool__):
        return bool(torch.isclose(*args, **kwargs).all())


def _pad(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    return _padded(*args, **kwargs) if has_symbols(args[1]) else NotImplemented


def _padded(x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    """``F.pad`` by amounts that are symbols, as concatenation."""
    if mode != "constant":
        raise Unremovable("padding by an amount that only the device knows, other than with a constant", "pad", user_site())
    for position in range(len(pad) // 2):
        dim, parts = x.dim() - 1 - position, [x]
        for amount, side in ((pad[2 * position], 0), (pad[2 * position + 1], 1)):
            if isinstance(amount, torch.SymInt) or amount:
                shape = (*x.shape[:dim], amount, *x.shape[dim + 1 :])
                parts.insert(0 if side == 0 else len(parts), x.new_full(shape, 0.0 if value is None else value))
        x = torch.cat(parts, dim) if len(parts) > 1 else x
    return x


def _counted(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``torch.arange(t)``, ``torch.full(size, t)``: tensors that stand for numbers."""
    order = reading_order(func, args, kwargs)
    read = {place: _number(args[place] if isinstance(place, int) else kwargs[place]) for place in order}
    positional = [read.get(place, value) for place, value in enumerate(args)]
    named = {name: read.get(name, value) for name, value in kwargs.items()}
    return func(*map(_number, positional), **{name: _number(value) for name, value in named.items()})


def _number(value: Any) -> Any:
    """A tensor given where a function wants a number, as the symbol that stands for its value."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    return tuple(map(_number, value)) if isinstance(value, (tuple, list)) else value


def _indexed(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``x[u]``, ``x[t0:t1] = y``."""
    x, index = args[0], _with_symbols(args[1], args[0].device)
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, torch.SymInt) for part in parts):
        return func(x, index, *args[2:], **kwargs)
    view, rest = _select(x, parts)
    plain = all(part == slice(None) for part in rest)
    if func is Tensor.__getitem__:
        return view if plain else view[rest]
    view.__setitem__(... if plain else rest, args[2])
    return None


def _with_symbols(index: Any, device: torch.device) -> Any:
    """An index whose slices are bounded by tensors, with their values as bounds."""
    if isinstance(index, tuple):
        return tuple(_with_symbols(part, device) for part in index)
    if isinstance(index, list) and has_symbols(index):
        return tensor_of(index, None, {"device": device})
    if isinstance(index, slice):
        return slice(_number(index.start), _number(index.stop), _number(index.step))
    if isinstance(index, Tensor) and index.dim() == 0 and index.dtype in _WHOLE[:-1]:
        return index.item()  # as torch's own indexing does
    return index


def _select(x: Tensor, index: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
    """``x`` at the integers of an index that are symbols, which torch's own indexing does not take, and the rest of the index."""
    taken = sum(1 for part in index if part is not None and part is not Ellipsis)
    spread = [p for part in index for p in ([slice(None)] * (x.dim() - taken) if part is Ellipsis else [part])]
    rest: list[Any] = []
    for part in spread:
        if isinstance(part, torch.SymInt):
            x = x.select(sum(1 for other in rest if other is not None), part)
        else:
            rest.append(part)
    return x, tuple(rest)


_EQUAL = (torch.equal, Tensor.equal)


def _assigned(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``y.data = x``, which no operator says: ``y`` lies where ``x`` does from then on."""
    target, source = args
    if (target.dtype, target.device, target.layout) != (source.dtype, source.device, source.layout):
        raise Unremovable("a tensor becomes one of another dtype or device", "Tensor.data", user_site())
    with torch.no_grad():
        target.set_(source)


_ENTRIES: dict[Any, Entry] = {
    Tensor.data.__set__: _assigned,  # type: ignore[attr-defined]
    **dict.fromkeys(_TO_HOST, _needed_by_host),
    **dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor), _from_list),
    **dict.fromkeys((torch.arange, torch.full, torch.zeros, torch.ones, torch.empty), _counted),
    **dict.fromkeys((Tensor.__getitem__, Tensor.__setitem__), _indexed),
    **dict.fromkeys((torch.unbind, Tensor.unbind), _unbind),
    **dict.fromkeys(_EQUAL, _equal),
    **dict.fromkeys((torch.allclose, Tensor.allclose), _allclose),
    Tensor.numpy: _numpy,
    Tensor.tolist: _tolist,
    torch.nn.functional.pad: _pad,
}
