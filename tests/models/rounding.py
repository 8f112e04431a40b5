"""A decoder of few layers, ways to compute it that round elsewhere, and faults to plant in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Tensor = torch.Tensor
aten = torch.ops.aten
ROWS, CAPACITY, VOCABULARY, EXPERTS = 3, 16, 200, 4
CACHE = 8  # tokens that are in the cache before the step


def rotated(x: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding of ``[rows, heads, width]`` at ``[rows]`` positions."""
    half = x.shape[-1] // 2
    angles = position.float()[:, None, None] / 1e4 ** (torch.arange(half) / half)
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Layer(nn.Module):
    """Attention over a cache, then a feed-forward net or the two best of four experts.

    ``fault`` is what is wrong with it, if anything.
    """

    def __init__(self, width: int, heads: int, experts: bool) -> None:
        super().__init__()
        self.heads, self.fault = heads, ""
        self.before, self.between = Norm(width), Norm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        if experts:
            self.router = nn.Linear(width, EXPERTS, bias=False)
            self.up = nn.Parameter(torch.randn(EXPERTS, 2 * width, width) / width**0.5)
            self.down = nn.Parameter(torch.randn(EXPERTS, width, 2 * width) / (2 * width) ** 0.5)
        else:
            self.gate, self.up_, self.down_ = (
                nn.Linear(width, 3 * width),
                nn.Linear(width, 3 * width),
                nn.Linear(3 * width, width),
            )

    def forward(self, x: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self._feed(self._attend(x, position, keys, values))

    def _attend(self, x: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows, y = torch.arange(ROWS), self.before(x)
        turned = position + 1 if self.fault == "position" else position
        q, k, v = (project(y).view(ROWS, self.heads, -1) for project in (self.q, self.k, self.v))
        if self.fault != "missed write":
            keys[rows, :, position] = rotated(k, turned)
            values[rows, :, position] = v
        visible = torch.arange(CAPACITY)[None] <= position[:, None]
        if self.fault == "mask":
            visible[0, 3] = False
        q = rotated(q, turned).unsqueeze(2)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible[:, None, None])
        return x + self.o(attended.reshape(ROWS, -1))

    def _feed(self, x: Tensor) -> Tensor:
        y = self.between(x)
        if not hasattr(self, "router"):
            side = F.relu if self.fault == "branch" else F.silu
            return x + self.down_(side(self.gate(y)) * self.up_(y))
        weight, chosen = self.router(y).float().softmax(-1).topk(2, -1)
        if self.fault == "expert":
            chosen = (chosen + 1) % EXPERTS
        hidden = F.silu(torch.einsum("rkfd,rd->rkf", self.up[chosen], y))
        outputs = torch.einsum("rkdf,rkf->rkd", self.down[chosen], hidden)
        return x + (outputs * (weight / weight.sum(-1, keepdim=True)).to(x.dtype).unsqueeze(-1)).sum(1)


class Decoder(nn.Module):
    """One decode step: token ids ``[ROWS]`` at positions ``[ROWS]`` -> logits ``[ROWS, VOCABULARY]``; writes its caches."""

    def __init__(self, layers: int = 3, width: int = 64, experts: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        heads = 4
        self.embedding, self.norm = nn.Embedding(VOCABULARY, width), Norm(width)
        self.layers = nn.ModuleList(Layer(width, heads, experts) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        cache = torch.randn(2, layers, ROWS, heads, CAPACITY, width // heads)
        cache[..., CACHE:, :] = 0
        self.register_buffer("cache", cache)
        self.to(dtype)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        x = self.embedding(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, position, self.cache[0, index], self.cache[1, index])
        return self.head(self.norm(x))


class Reordered(TorchDispatchMode):
    """Eager with products summed in another order (``"permuted"``), in two halves (``"split"``), or so with the halves rounded
    and attention in single operators (``"unfused"``)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.mm.default, aten.bmm.default):
            return self._product(*args)
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default and self.kind == "unfused":
            query, key, value = args[:3]
            weights = (query @ key.mT) * query.shape[-1] ** -0.5 + kwargs["attn_mask"]
            return weights.softmax(-1) @ value, None
        return func(*args, **kwargs)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.kind == "permuted":
            order = torch.randperm(b.shape[-2])
            return a[..., order] @ b[..., order, :]
        half, dtype = b.shape[-2] // 2, a.dtype
        if self.kind == "split":
            a, b = a.float(), b.float()
        return (a[..., :half] @ b[..., :half, :] + a[..., half:] @ b[..., half:, :]).to(dtype)


def unrounded(model: Decoder) -> Decoder:
    """The same step in float32: what a compiler comes near to that keeps numbers in registers."""
    return copy.deepcopy(model).float()


def _swap_rows(weight: Tensor) -> None:
    weight[[2, 3]] = weight[[3, 2]]


FAULTS: dict[str, Callable[[Decoder], object]] = {
    "row of the head": lambda model: model.head.weight[7].zero_(),
    "rows of the head": lambda model: _swap_rows(model.head.weight),
    "row of keys": lambda model: model.layers[1].k.weight[3].zero_(),
    "rows of values": lambda model: _swap_rows(model.layers[1].v.weight),
    **{
        fault: lambda model, fault=fault: setattr(model.layers[1], "fault", fault)
        for fault in ("missed write", "position", "mask", "branch", "expert")
    },
}
