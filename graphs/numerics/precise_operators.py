"""Operators that need more than another dtype to run in float64, as tables for `graphs.numerics.high_precision`.

Functions of `PRECISE` take the operator, its arguments and keywords with float64 in place of what rounds, and the result of
eager. They return what corresponds to that result, with None for what needs no float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
aten = torch.ops.aten


class CannotRaise(Exception):
    """An operator that cannot run in float64."""


def _packets(names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names.split() if hasattr(aten, name))


UNINITIALISED = _packets("empty empty_like empty_strided empty_permuted new_empty new_empty_strided")
"""Their results hold whatever lay there, which is what eager sees too."""

DECISIONS = _packets("floor floor_ ceil ceil_ round round_ trunc trunc_ sign sign_ sgn sgn_ heaviside heaviside_")
"""Steps: away from the step there is no error, and at it eager has decided."""

DRAWS = _packets(
    "rand rand_like randn randn_like randint randint_like randperm uniform_ exponential_ random_ cauchy_ geometric_ log_normal_"
    " normal_ bernoulli bernoulli_ multinomial"
)
"""Random numbers that do not depend on rounded ones, but for the decisions of ``bernoulli`` and ``multinomial``."""

MOVES = _packets(
    "index_select embedding gather index take clone cat stack repeat flip roll constant_pad_nd masked_select unfold_copy"
)
"""They compute nothing: where what they read was never rounded, neither is their result."""


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _chosen(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """``(values, indices)``: the values at the indices that eager chose."""
    named = _named(func, args, kwargs)
    values, indices = result
    if "out" in named or "values" in named:
        raise CannotRaise("it writes its result to a given tensor")
    source, dim = named["self"], named.get("dim", -1)
    if source.dim() == 0:
        return source.clone(), None
    if values.dim() < source.dim():
        return source.gather(dim, indices.unsqueeze(dim)).squeeze(dim), None
    return source.gather(dim, indices), None


def _attention(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """Fused attention, whose kernels know some dtypes only, as products and a softmax. The log-sum-exp is eager's."""
    named = _named(func, args, kwargs)
    if named.get("dropout_p", 0.0):
        raise CannotRaise("it draws random numbers")
    query, key, value = named["query"], named["key"], named["value"]
    mask = named.get("attn_mask", named.get("attn_bias"))
    settings = {"is_causal": named.get("is_causal", False), "scale": named.get("scale")}
    grouped = query.dim() == 4 and query.shape[1] != key.shape[1]
    output = aten._scaled_dot_product_attention_math(query, key, value, mask, **settings, enable_gqa=grouped)[0]
    if output.shape != result[0].shape:
        raise CannotRaise(f"its result has shape {tuple(result[0].shape)}, not {tuple(output.shape)}")
    return (output,)


def _softmax(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """Softmax without ``half_to_float``, which float64 must not ask for."""
    named = _named(func, args, kwargs)
    return func(named["self"], named["dim"], False)


def _grouped_product(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """Products of groups of rows with one matrix each; groups end at ``offs``."""
    named = _named(func, args, kwargs)
    rows: Tensor = named["self" if "self" in named else "input"]
    matrices: Tensor = named["mat2" if "mat2" in named else "weight"]
    ends = named.get("offs")
    if named.get("bias") is not None or (ends is not None and (rows.dim(), matrices.dim()) != (2, 3)):
        raise CannotRaise("only rows grouped by expert are known")
    if ends is None:
        return rows @ matrices
    output = torch.zeros(result.shape, dtype=rows.dtype, device=rows.device)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(rows[start:end], matrices[expert], out=output[start:end])
        start = end
    output[start:].copy_(result[start:])  # rows of no group: what eager left there
    return output


_CHOOSING = _packets("topk sort max min kthvalue median nanmedian mode cummax cummin")
_FUSED_ATTENTION = _packets(
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
    " _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable"
)


def _reduced_or_chosen(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """``max`` of a whole tensor is a number; along a dimension it comes with indices."""
    return _chosen(func, args, kwargs, result) if isinstance(result, (tuple, list)) else func(*args, **kwargs)


PRECISE: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {
    **dict.fromkeys(_CHOOSING, _reduced_or_chosen),
    **dict.fromkeys(_FUSED_ATTENTION, _attention),
    **dict.fromkeys(_packets("_softmax _log_softmax"), _softmax),
    **dict.fromkeys(_packets("_grouped_mm"), _grouped_product),
}
"""How an operator runs in float64, where it cannot be called with float64 tensors."""

FOREIGN: dict[str, Callable[[Any, Any, Any, Any], Any]] = {"transformers::grouped_mm_fallback": _grouped_product}
"""The same for operators outside ATen, by the name of their schema: here, what stands in where ``_grouped_mm`` cannot run."""
