"""What a skinny product does beside multiplying."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Around(NamedTuple):
    """What there is beside the products: a norm of ``x``, and behind them an activation or a sum."""

    norm: str = "none"
    gain: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 0.0
    activation: str = "none"
    residual: Tensor | None = None
