"""The first difference between a call of the captured twin and one of the eager twin."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree

from graphs.numerics.tolerance import difference
from graphs.parity.twins import Called

Tensor = torch.Tensor


def call_difference(eager: Called, captured: Called) -> tuple[str, str] | None:
    """What differs first, and how; None where nothing does."""
    if type(eager.raised) is not type(captured.raised):
        return "exception", f"raises {_exception(captured.raised)}, eager {_exception(eager.raised)}"
    return _outputs(eager.output, captured.output) or _leaves(eager.leaves, captured.leaves)


def _exception(error: Exception | None) -> str:
    return "nothing" if error is None else f"{type(error).__name__} ({str(error).splitlines()[0] if str(error) else ''})"


def _outputs(eager: Any, captured: Any) -> tuple[str, str] | None:
    (wanted, form), (got, other) = _pytree.tree_flatten_with_path(eager), _pytree.tree_flatten_with_path(captured)
    if form != other:
        return "output", f"has the structure {other}, eager {form}"
    for (path, a), (_, b) in zip(wanted, got, strict=True):
        text = leaf_difference(a, b)
        if text:
            return f"output{_pytree.keystr(path)}", text
    return None


def _leaves(eager: dict[str, Any], captured: dict[str, Any]) -> tuple[str, str] | None:
    for path in dict.fromkeys([*eager, *captured]):
        if path not in captured or path not in eager:
            return path, f"is {'absent' if path in eager else 'there'}, eager leaves it {'there' if path in eager else 'absent'}"
        text = leaf_difference(eager[path], captured[path])
        if text:
            return path, text
    return None


def leaf_difference(a: Any, b: Any) -> str:
    """How ``b`` differs from ``a``: tensors by bits, else by the tolerance of their dtype; plain values by type and value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _tensor_difference(a, b)
    if type(a) is not type(b):
        return f"is a {type(b).__name__}, eager gives a {type(a).__name__}"
    if isinstance(a, (tuple, list)) and len(a) == len(b):
        return next((text for x, y in zip(a, b, strict=True) if (text := leaf_difference(x, y))), "")
    if type(a).__module__ == "numpy":
        return "" if a.tobytes() == b.tobytes() else "is in another state than eager leaves it"
    plain = isinstance(a, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))
    return "" if not plain or a == b or (a != a and b != b) else f"is {b!r}, eager gives {a!r}"


def _tensor_difference(a: Tensor, b: Tensor) -> str:
    if torch.strided not in (a.layout, b.layout):
        return "" if a.layout == b.layout else f"has layout {b.layout}, eager gives {a.layout}"
    if a.is_conj() or a.is_neg() or b.is_conj() or b.is_neg():
        a, b = a.resolve_conj().resolve_neg(), b.resolve_conj().resolve_neg()
    same = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return "" if same else difference(a, b)
