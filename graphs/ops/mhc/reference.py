"""What the operators ``graphs::mhc_*`` mean, in operators of torch: the arithmetic of transformers' DeepSeek-V4 to the bit.

H streams of D features stand for the residual of a decoder. Before a block, an RMS norm over all H * D features and one linear
layer in float32 give three kinds of weights: ``pre`` [H], by which the streams are summed to the input of the block, ``post``
[H], by which its output is spread over the streams, and ``comb`` [H, H], by which the streams are mixed behind it. ``comb`` is
made doubly stochastic by normalising columns and rows in turn (Sinkhorn and Knopp).

Formulas: Xie et al., "mHC: Manifold-Constrained Hyper-Connections" (2026); the order of operators and what is rounded where:
``transformers.models.deepseek_v4``, releases 5.17 and 5.24. Shapes: T stands for any number of leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def normed(streams: Tensor, norm_eps: float) -> Tensor:
    """All features of a token, over their root mean square: float32 ``[T, H * D]`` of ``streams [T, H, D]``."""
    flat = streams.flatten(-2).float()
    return flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def collapsed(pre: Tensor, streams: Tensor) -> Tensor:
    """The sum of the streams by the float32 weights ``pre [T, H]``, rounded once: ``[T, D]`` in the dtype of ``streams``."""
    return (pre.unsqueeze(-1) * streams).sum(dim=-2).to(streams.dtype)


def sinkhorn(comb: Tensor, eps: float, iterations: int) -> Tensor:
    """``comb [T, H, H]`` with its columns normalised, then ``iterations - 1`` times its rows and its columns."""
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb


def pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The input of a block, and the weights for what comes behind it.

    Args:
        streams: ``[T, H, D]`` of a float dtype.
        fn: ``[(2 + H) * H, H * D]``: the linear layer, rows of ``pre``, ``post``, ``comb`` in that order.
        base: ``[(2 + H) * H]``, added to what the layer gives once that is scaled.
        scale: ``[3]``, for ``pre``, ``post``, ``comb``.
        norm_eps: added to the mean square.
        eps: added to ``pre``, to ``comb`` and to each sum of it.
        iterations: normalisations of the columns of ``comb``; at least 1.

    Returns:
        The input ``[T, D]`` in the dtype of ``streams``, ``post`` ``[T, H]`` and ``comb`` ``[T, H, H]`` in float32.
    """
    hc = streams.shape[-2]
    pre_w, post_w, comb_w = functional.linear(normed(streams, norm_eps), fn.float()).split([hc, hc, hc * hc], dim=-1)
    pre_b, post_b, comb_b = base.split([hc, hc, hc * hc])
    pre_scale, post_scale, comb_scale = scale.unbind(0)
    weights = torch.sigmoid(pre_w * pre_scale + pre_b) + eps
    post = 2 * torch.sigmoid(post_w * post_scale + post_b)
    logits = comb_w.view(*comb_w.shape[:-1], hc, hc) * comb_scale + comb_b.view(hc, hc)
    comb = sinkhorn(torch.softmax(logits, dim=-1) + eps, eps, iterations)
    return collapsed(weights, streams), post, comb


def post(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams behind a block: ``post * out + comb.T @ streams``, both terms and their sum rounded as ``streams`` are.

    Args:
        out: ``[T, D]``, what the block gave, in the dtype of ``streams``.
        streams: ``[T, H, D]``, before the block.
        post, comb: float32 ``[T, H]`` and ``[T, H, H]``, as `pre` gives them.
    """
    dtype = streams.dtype
    spread = post.to(dtype).unsqueeze(-1) * out.unsqueeze(-2)
    return spread + torch.matmul(comb.to(dtype).transpose(-1, -2), streams)


def head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    """The streams summed to one behind the last block: ``[T, D]`` in their dtype.

    Args:
        streams: ``[T, H, D]``.
        fn: ``[H, H * D]``.
        base: ``[H]``.
        scale: ``[1]``.
        norm_eps, eps: as of `pre`.
    """
    mixes = functional.linear(normed(streams, norm_eps), fn.float())
    weights = torch.sigmoid(mixes * scale.float() + base.float()) + eps
    return collapsed(weights, streams)
