"""Attention of one query becomes sums, which a compiler fuses with what is around them.

Where an operator for it is given, that takes its place instead, with keys and values as they are before they are repeated, and
with the boolean mask of which the bias was made: ``where(mask, 0, -inf)``, or with -65504 for ``-inf``, which torch up to 2.11
writes where it chose cuDNN (``convert_boolean_attn_mask_cudnn``). Else nothing of a cache would count as hidden there, and each
layer would write a bias of its own.

A library's attention kernel wants keys and values as they are stored in memory, so grouped heads are first written out,
one copy per query head, and it works in tiles of 64 queries or more. A decode step has one query: there is nothing to tile.

Before::

    %attention : _scaled_dot_product_*_attention(args = (%q, %k, %v, %mask, ...))    # q [B, H, 1, D], k and v [B, H, S, D]
    %getitem : getitem(args = (%attention, 0))

After::

    scores = (q * k).sum(-1) * scale + mask          # [B, H, S], in float32
    weights = exp(scores - max); weights / sum       # 0 everywhere in a row that is masked everywhere
    result = (weights[..., None] * v).sum(-2)        # [B, H, 1, D], rounded once
"""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.operator_schemas import normalize_function

from passes.optimize.operators.emitter import Emitter
from passes.optimize.operators.repeated_heads import repeated_source

aten = torch.ops.aten
_ATTENTION = tuple(
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(aten, name)
)
_SAME_ELEMENTS = (
    aten.clone.default,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
)
_VIEWS = (aten.expand.default, aten.reshape.default, aten.unsqueeze.default, aten.view.default)
_DTYPES = (torch.bfloat16, torch.float16)
_FILLED: dict[Any, int] = {aten.full.default: 1, aten.scalar_tensor.default: 0}  # -> which argument is the number
_HIDDEN_FROM_CUDNN = -65504.0


def one_query_attention(
    module: GraphModule,
    *,
    longest: int,
    grouped: bool = False,
    operator: Any = None,
    fits: Callable[[tuple[int, ...], tuple[int, ...]], bool] | None = None,
) -> list[tuple[str, str]]:
    """Replace attention of one query over at most ``longest`` keys; not where it drops out, is causal or returns more.

    Args:
        grouped: by sums only where keys are repeated for several query heads, which costs a library the most.
        operator: called as ``operator(query, key, value, mask, scale)`` with ``[B, H, 1, D]`` and twice ``[B, G, S, D]``, of any
            number of keys, and a mask that broadcasts to ``[B, H, 1, S]``: a bias, boolean (True: seen), or None.
        fits: whether it takes these shapes of query and key.
    """
    changes = []
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in _ATTENTION:
            continue
        given = _replaceable(node)
        if given is None:
            continue
        before, emit = node.format_node() or str(node), Emitter(module, given["query"].meta["val"])
        with module.graph.inserting_before(node):
            result = None
            if operator is not None and fits is not None and _takes(fits, given):
                result = _by_operator(emit, given, operator, _hidden_by(node))
            if result is None:
                if _length(given) > longest or (grouped and not _is_repeated(given["key"])):
                    continue
                result = _attend(emit, **given)
        for user in list(node.users):
            user.replace_all_uses_with(result)
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        changes.append((before, result.format_node() or str(result)))
    return changes


def _length(given: dict[str, Any]) -> int:
    length: int = given["key"].meta["val"].shape[2]
    return length


def _shared(given: dict[str, Any]) -> list[Node] | None:
    """Keys and values ``[B, G, 1, S, D]`` that were repeated alike; None where they were not."""
    found = [repeated_source(given[name]) for name in ("key", "value")]
    sources = [source[0] for source in found if source is not None and not source[1]]
    return sources if len(sources) == 2 and sources[0].meta["val"].shape == sources[1].meta["val"].shape else None


def _takes(fits: Callable[[tuple[int, ...], tuple[int, ...]], bool], given: dict[str, Any]) -> bool:
    """Whether the operator takes the shapes; values are as wide as keys there."""
    query, key, value = (given[name].meta["val"].shape for name in ("query", "key", "value"))
    sources = _shared(given)
    held = key if sources is None else sources[0].meta["val"].select(2, 0).shape
    return bool(key == value and fits(tuple(query), tuple(held)))


def _by_operator(emit: Emitter, given: dict[str, Any], operator: Any, hidden: tuple[float, ...]) -> Node:
    sources = _shared(given)
    key, value = (given["key"], given["value"]) if sources is None else (emit(aten.squeeze.dim, one, 2) for one in sources)
    mask = given["mask"]
    if mask is not None:
        visible = _visible(emit, mask, hidden)
        mask = mask if visible is None else visible
        while mask.meta["val"].dim() < 4:
            mask = emit(aten.unsqueeze.default, mask, 0)
    return emit(operator, given["query"], key, value, mask, given["scale"])


def _hidden_by(node: Node) -> tuple[float, ...]:
    """The numbers that stand for False where a library's attention is given a bias for a boolean mask."""
    chosen_cudnn = node.target is aten._scaled_dot_product_cudnn_attention.default
    return (-torch.inf, _HIDDEN_FROM_CUDNN) if chosen_cudnn else (-torch.inf,)


def _visible(emit: Emitter, mask: Node, hidden: tuple[float, ...]) -> Node | None:
    """The boolean mask, True where something is seen, that a bias of 0 and a number of ``hidden`` was made of."""
    views, made = [], mask
    while made.op == "call_function" and made.target in _VIEWS:
        views.append(made)
        made = made.args[0]  # type: ignore[assignment]
    if made.op != "call_function" or made.target is not aten.where.self:
        return None
    chosen, shape = made.args[0], made.meta["val"].shape
    numbers = [_number(argument) for argument in made.args[1:]]
    if numbers[1] == 0 and numbers[0] in hidden:
        chosen = emit(aten.logical_not.default, chosen)
    elif numbers[0] != 0 or numbers[1] not in hidden:
        return None
    made = chosen  # type: ignore[assignment]
    if made.meta["val"].shape != shape:
        made = emit(aten.expand.default, made, list(shape))
    for view in reversed(views):
        target = aten.reshape.default if view.target is aten.view.default else view.target  # of what is expanded there is no view
        made = emit(target, made, *view.args[1:], **view.kwargs)
    return made


def _number(node: Any) -> float | None:
    """What a tensor is filled with, if that is known."""
    if not isinstance(node, Node) or node.target not in _FILLED:
        return None
    number = node.args[_FILLED[node.target]]
    return number if isinstance(number, (int, float)) else None


def _replaceable(node: Node) -> dict[str, Any] | None:
    """Query, key, value, mask and scale of an attention that sums can stand for; else None."""
    target: Any = node.target
    normal = normalize_function(target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)  # type: ignore[arg-type]
    if normal is None:
        return None
    given = normal.kwargs
    query, key, value = (given[name] for name in ("query", "key", "value"))
    mask = given.get("attn_bias", given.get("attn_mask"))
    if any(user.target is not python.getitem or (user.args[1] != 0 and user.users) for user in node.users):
        return None
    if given.get("is_causal") or given.get("dropout_p"):
        return None
    q, k, v = (tensor.meta.get("val") for tensor in (query, key, value))
    if not all(isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.dtype in _DTYPES for tensor in (q, k, v)):
        return None
    sizes = (*q.shape, *k.shape)
    if not all(isinstance(size, int) for size in sizes) or q.shape[2] != 1 or 0 in sizes:
        return None
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
        return None
    bias = mask.meta.get("val") if isinstance(mask, Node) else None
    if mask is not None and (not isinstance(bias, torch.Tensor) or bias.dim() not in (2, 4) or not bias.is_floating_point()):
        return None
    scale = given.get("scale")
    return {"query": query, "key": key, "value": value, "mask": mask, "scale": q.shape[-1] ** -0.5 if scale is None else scale}


def _is_repeated(node: Node) -> bool:
    """Whether a tensor is an expanded one, written out or not."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        source = node.args[0]
        if node.target is aten.expand.default:
            return bool(node.meta["val"].numel() > source.meta["val"].numel())
        if node.target not in _SAME_ELEMENTS:
            return False
        node = source
    return False


def _as_float(emit: Emitter, node: Node) -> Node:
    return emit(torch.ops.prims.convert_element_type.default, node, torch.float32)


def _at_least(emit: Emitter, node: Node, limit: float) -> Node:
    """The larger of each element and a number; NaN stays."""
    number = emit(aten.full.default, [], limit, dtype=torch.float32, device=emit.device)
    return emit(aten.maximum.default, node, number)


def _attend(emit: Emitter, query: Node, key: Node, value: Node, mask: Node | None, scale: float) -> Node:
    scores = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, _as_float(emit, query), _as_float(emit, key)), [-1])
    scores = emit(aten.mul.Tensor, scores, scale)
    if mask is not None:
        scores = emit(aten.add.Tensor, scores, _as_float(emit, emit(aten.squeeze.dim, mask, -2)))
    largest = _at_least(emit, emit(aten.amax.default, scores, [-1], True), torch.finfo(torch.float32).min)
    shares = emit(aten.exp.default, emit(aten.sub.Tensor, scores, largest))  # of a row masked everywhere: exp(-inf), not NaN
    total = _at_least(emit, emit(aten.sum.dim_IntList, shares, [-1], True), 1.0)  # every other row has the share of its largest
    shares = emit(aten.div.Tensor, shares, total)
    weighted = emit(aten.mul.Tensor, emit(aten.unsqueeze.default, shares, -1), _as_float(emit, value))
    result = emit(aten.sum.dim_IntList, weighted, [-2], True)
    return emit(torch.ops.prims.convert_element_type.default, result, query.meta["val"].dtype)
