"""``grouped_mm`` with its offsets on the device, for dtypes whose kernel has the host read them.

Before, where rows ``offs[g - 1] .. offs[g]`` of ``a [rows, k]`` belong to matrix ``g`` of ``b [groups, k, n]``::

    %y : _grouped_mm.default(%a, %b, %offs)

After::

    %group : searchsorted.Tensor(%offs, %iota, right = True)
    %chosen : index_select.default(%b, 0, %group)
    %y : bmm.default(%a_rows, %chosen)

With more rows than a third of the groups every row is multiplied with every matrix and its own product picked, which reads
each matrix once and copies none. The kernel for bfloat16 on recent GPUs reads the offsets itself, and stays, as does the
operator on a CPU. Rows behind the last offset are undefined, as they are in the operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.host_values.rewriter import Rewriter

aten = torch.ops.aten
GROUPED = aten._grouped_mm.default


def needs_offsets(node: Node) -> bool:
    """Whether an operator's kernel has the host wait for its offsets."""
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    offsets = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
    return offsets is not None and value.device.type != "cpu" and not has_device_kernel(value)


def has_device_kernel(value: torch.Tensor) -> bool:
    """Whether torch multiplies groups of a tensor like this in one kernel that reads the offsets on the device."""
    if value.dtype != torch.bfloat16:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(value.device)[0] in (9, 10)


def grouped_mm(rw: Rewriter, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
    """Groups of rows through a matrix each; the other forms are refused by name."""
    a, b = args[:2]
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    if any(rw.lengths(x) for x in (a, b, offsets) if isinstance(x, Node)):
        rw.no_rule("a grouped product of a length that only the device knows", node)
    if offsets is None or not needs_offsets(node):
        return None
    if (a.meta["val"].dim(), b.meta["val"].dim()) != (2, 3):
        rw.no_rule("a product of groups of columns, or of sums", node)
    return by_rows(rw, a, b, offsets)


def by_rows(rw: Rewriter, a: Node, b: Node, offsets: Node) -> Node:
    """The product of each row with the matrix of its group."""
    rows, groups = a.meta["val"].shape[0], b.meta["val"].shape[0]
    iota = rw.iota(rows, a.meta["val"].device)
    ends = rw.call(aten._to_copy.default, offsets, dtype=torch.int64)
    group = rw.call(aten.clamp.default, rw.call(aten.searchsorted.Tensor, ends, iota, right=True), 0, groups - 1)
    if 3 * rows <= groups:
        chosen = rw.call(aten.index_select.default, b, 0, group)
        return rw.call(aten.squeeze.dim, rw.call(aten.bmm.default, rw.call(aten.unsqueeze.default, a, 1), chosen), 1)
    every = rw.call(aten.bmm.default, rw.call(aten.expand.default, rw.call(aten.unsqueeze.default, a, 0), [groups, -1, -1]), b)
    return rw.call(aten.index.Tensor, every, [group, iota])
