"""Blocks with hyper-connections around them, as transformers spells those of DeepSeek-V4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HC, WIDTH = 4, 32
EPS = 1e-6


class Connection(nn.Module):
    """A hyper-connection as transformers 5.17 spells it; parts of it may be spelled, or meant, otherwise."""

    def __init__(self, weights: torch.dtype = torch.float32, iterations: int = 3) -> None:
        super().__init__()
        outputs = (2 + HC) * HC
        self.iterations = iterations
        self.fn = nn.Parameter(torch.randn(outputs, HC * WIDTH, dtype=weights) / 12, requires_grad=False)
        self.base = nn.Parameter(torch.randn(outputs, dtype=weights), requires_grad=False)
        self.scale = nn.Parameter(torch.randn(3, dtype=weights), requires_grad=False)

    def normed(self, x: Tensor) -> Tensor:
        flat = x.flatten(start_dim=2).float()
        return flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)

    def layer(self, normed: Tensor) -> Tensor:
        return functional.linear(normed, self.fn.float())

    def weights(self, mixes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre_w, post_w, comb_w = mixes.split([HC, HC, HC * HC], dim=-1)
        pre_b, post_b, comb_b = self.base.split([HC, HC, HC * HC])
        a, b, c = self.scale.unbind(0)
        logits = comb_w.view(*comb_w.shape[:-1], HC, HC) * c + comb_b.view(HC, HC)
        return torch.sigmoid(pre_w * a + pre_b) + EPS, 2 * torch.sigmoid(post_w * b + post_b), torch.softmax(logits, -1) + EPS

    def normalised(self, comb: Tensor) -> Tensor:
        comb = comb / (comb.sum(dim=-2, keepdim=True) + EPS)
        for _ in range(self.iterations - 1):
            comb = comb / (comb.sum(dim=-1, keepdim=True) + EPS)
            comb = comb / (comb.sum(dim=-2, keepdim=True) + EPS)
        return comb

    def collapsed(self, pre: Tensor, x: Tensor) -> Tensor:
        return (pre.unsqueeze(-1) * x).sum(dim=2).to(x.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, comb = self.weights(self.layer(self.normed(x)))
        return post, self.normalised(comb), self.collapsed(pre, x)


class Head(nn.Module):
    """What comes behind the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.fn = nn.Parameter(torch.randn(HC, HC * WIDTH) / 12, requires_grad=False)
        self.base = nn.Parameter(torch.randn(HC), requires_grad=False)
        self.scale = nn.Parameter(torch.randn(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2).float()
        mixes = functional.linear(flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS), self.fn.float())
        pre = torch.sigmoid(mixes * self.scale.float() + self.base.float()) + EPS
        return (pre.unsqueeze(-1) * x).sum(dim=2).to(x.dtype)


class Blocks(nn.Module):
    """Blocks with hyper-connections around them, and the head."""

    def __init__(self, kind: Callable[..., nn.Module] = Connection, count: int = 2, head: bool = True, **how: Any) -> None:
        super().__init__()
        self.connections = nn.ModuleList(kind(**how) for _ in range(count))
        self.head = Head() if head else nn.Identity()

    def behind(self, out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        dtype = x.dtype
        return post.to(dtype).unsqueeze(-1) * out.unsqueeze(-2) + torch.matmul(comb.to(dtype).transpose(-1, -2), x)

    def forward(self, x: Tensor) -> Tensor:
        for connection in self.connections:
            post, comb, mixed = connection(x)
            x = self.behind(torch.relu(mixed), x, post, comb)
        return self.head(x)


def streams(rows: int = 2, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, 1, HC, WIDTH).to(dtype)
