"""A decode step that both rewrites of compiled steps apply to."""

from __future__ import annotations

import torch
from torch import nn

Tensor = torch.Tensor


class OneQueryAttention(nn.Module):
    """One query over a cache that the step writes, with a common activation for queries, keys and values.

    Args:
        rows: of the cache.
        masked: whether rows behind the position are masked.
    """

    def __init__(self, rows: int, *, masked: bool = False) -> None:
        super().__init__()
        self.rows, self.masked = rows, masked
        self.q, self.k, self.v = (nn.Linear(256, n, bias=False) for n in (256, 64, 64))
        self.register_buffer("keys", torch.randn(2, 1, rows, 64))
        self.register_buffer("values", torch.randn(2, 1, rows, 64))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.keys.index_copy_(2, position, self.k(x).view(2, 1, 1, 64))
        self.values.index_copy_(2, position, self.v(x).view(2, 1, 1, 64))
        keys, values = (held.expand(2, 4, self.rows, 64) for held in (self.keys, self.values))
        query = self.q(x).view(2, 1, 4, 64).transpose(1, 2)
        mask = (torch.arange(self.rows, device=x.device) <= position)[None, None, None] if self.masked else None
        return nn.functional.scaled_dot_product_attention(query, keys, values, mask)


def pair_of(model: OneQueryAttention) -> tuple[OneQueryAttention, OneQueryAttention]:
    """The model and another with the same weights and caches."""
    twin = OneQueryAttention(model.rows, masked=model.masked).to(model.keys.device, model.keys.dtype)
    twin.load_state_dict(model.state_dict())
    return model, twin
