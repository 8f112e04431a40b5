"""What a skinny product does beside multiplying, in Triton: the norm of its rows before, an activation and a sum behind."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def moments(x, M, K, eps, LAYER: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    """The mean of each row (0 but for a layer norm) and one over its deviation from it; CHUNK divides K."""
    rows = tl.arange(0, BLOCK_M)
    place = x + rows[:, None] * K + tl.arange(0, CHUNK)[None, :]
    live = (rows < M)[:, None]
    mean = tl.zeros((BLOCK_M,), tl.float32)
    if LAYER:
        total = tl.zeros((BLOCK_M, CHUNK), tl.float32)
        for start in range(0, K, CHUNK):
            total += tl.load(place + start, mask=live, other=0.0).to(tl.float32)
        mean = tl.sum(total, 1) / K
    squares = tl.zeros((BLOCK_M, CHUNK), tl.float32)
    for start in range(0, K, CHUNK):
        away = tl.load(place + start, mask=live, other=0.0).to(tl.float32) - mean[:, None]
        squares += away * away
    return mean, factor(tl.sum(squares, 1), K, eps)


@triton.jit
def factor(squares, K, eps):
    """One over the root of the mean of ``K`` squares."""
    return 1.0 / tl.sqrt(squares / K + eps)


@triton.jit
def sigmoid(y):
    """1 / (1 + exp(-y)), which goes to 0 and 1 where the power does to infinity and 0."""
    return 1.0 / (1.0 + tl.exp(-y))


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """An activation of float32."""
    if ACTIVATION == "silu":
        y = y * sigmoid(y)
    elif ACTIVATION == "relu":
        y = tl.where(y > 0, y, tl.where(y == y, 0.0, y))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = y * sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "quick_gelu":
        y = y * sigmoid(1.702 * y)
    return y
