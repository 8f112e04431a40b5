"""The operators ``graphs::mhc_*`` with what they mean, for the pass that looks for it in graphs."""

from __future__ import annotations

import torch

from graphs.ops.mhc import operator, reference, tiles
from passes import HyperConnections

FAMILY = HyperConnections(
    pre=reference.pre,
    post=reference.post,
    head=reference.head,
    pre_operator=torch.ops.graphs.mhc_pre.default,
    post_operator=torch.ops.graphs.mhc_post.default,
    post_pre_operator=torch.ops.graphs.mhc_post_pre.default,
    head_operator=torch.ops.graphs.mhc_head.default,
    fits=tiles.few,
    dtypes=frozenset(operator.DTYPES),
)
