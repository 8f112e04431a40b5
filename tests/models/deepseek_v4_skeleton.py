"""The decode step of DeepSeek-V4 as it is first written: one sequence after the other, the host reading what it needs.

Toy sizes, the same structure: a window ring, one compressed entry per ``ratio`` tokens, the best entries of those
committed, state that is reset where a sequence starts, and a loop over experts that got tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 32
    layers: int = 2
    width: int = 16
    heads: int = 2
    head: int = 8
    window: int = 6
    ratio: int = 4
    top: int = 3
    slots: int = 5
    positions: int = 64
    experts: int = 4
    chosen: int = 2


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding of the last dimension of ``[rows, ..., head]`` at ``[rows]`` positions."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / 100.0 ** (torch.arange(half, device=x.device) / half)
    angles = (position.unsqueeze(-1) * frequencies).view(-1, *[1] * (x.dim() - 2), half)
    real, imaginary = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


class Compressor(nn.Module):
    """Gathers ``ratio`` tokens of a slot and commits their gated mean as one entry."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ratio = sizes.ratio
        self.kv = nn.Linear(sizes.width, sizes.head, bias=False)
        self.gate = nn.Linear(sizes.width, sizes.head, bias=False)
        self.bias = nn.Parameter(torch.randn(sizes.ratio, sizes.head))
        self.register_buffer("pending", torch.zeros(sizes.slots, sizes.ratio, sizes.head))
        self.register_buffer("gates", torch.zeros(sizes.slots, sizes.ratio, sizes.head))
        self.register_buffer("entries", torch.zeros(sizes.slots, sizes.positions // sizes.ratio, sizes.head))

    def reset(self, slot: int) -> None:
        for state in (self.pending, self.gates, self.entries):
            state[slot].zero_()

    def forward(self, x: Tensor, slot: int, start_pos: int) -> Tensor:
        """Entries ``[committed, head]`` of a slot after the token ``x`` of shape ``[1, width]``."""
        self.pending[slot, start_pos % self.ratio] = self.kv(x)[0]
        self.gates[slot, start_pos % self.ratio] = self.gate(x)[0] + self.bias[start_pos % self.ratio]
        end_pos = start_pos + 1
        if end_pos % self.ratio == 0:
            entry = (self.pending[slot] * self.gates[slot].softmax(0)).sum(0, keepdim=True)
            first = torch.as_tensor([end_pos - self.ratio], device=x.device)
            self.entries[slot, start_pos // self.ratio] = rotate(entry, first)[0]
        n_committed = end_pos // self.ratio
        return self.entries[slot, :n_committed]


class Attention(nn.Module):
    """Window and selected entries, one shared key and value head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.window, self.top, self.heads, self.head = sizes.window, sizes.top, sizes.heads, sizes.head
        self.q = nn.Linear(sizes.width, sizes.heads * sizes.head, bias=False)
        self.kv = nn.Linear(sizes.width, sizes.head, bias=False)
        self.indexer = nn.Linear(sizes.width, sizes.head, bias=False)
        self.out = nn.Linear(sizes.heads * sizes.head, sizes.width, bias=False)
        self.sink = nn.Parameter(torch.randn(sizes.heads, 1))
        self.compressor = Compressor(sizes)
        self.register_buffer("ring", torch.zeros(sizes.slots, sizes.window, sizes.head))

    def forward(self, x: Tensor, positions: Tensor, cu_seqlens: Tensor, slots: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        slot_list = slots.tolist()
        for sequence, (t0, t1) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            start_pos = int(positions[t0:t1][0].item())
            out[t0:t1] = self.one_sequence(x[t0:t1], slot_list[sequence], start_pos)
        return out

    def one_sequence(self, x: Tensor, slot: int, start_pos: int) -> Tensor:
        if start_pos == 0:
            self.ring[slot].zero_()
            self.compressor.reset(slot)
        position = torch.as_tensor([start_pos], device=x.device)
        q = rotate(self.q(x).view(-1, self.heads, self.head), position)[0]
        self.ring[slot, start_pos % self.window] = rotate(self.kv(x), position)[0]
        keys = self.ring[slot, : min(start_pos + 1, self.window)]
        committed = self.compressor(x, slot, start_pos)
        n_committed = committed.shape[0]
        if n_committed > 0:
            best = (committed @ self.indexer(x)[0]).topk(min(self.top, n_committed)).indices
            keys = torch.cat([keys, committed[best]])
        scores = torch.cat([q @ keys.T * self.head**-0.5, self.sink], dim=-1)
        mixed = scores.softmax(-1)[:, :-1] @ keys
        return self.out(mixed.view(1, -1))


class Experts(nn.Module):
    """A shared expert and those that a router chose, each run on its own tokens."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.experts, self.chosen = sizes.experts, sizes.chosen
        self.router = nn.Linear(sizes.width, sizes.experts, bias=False)
        self.routed = nn.ModuleList(nn.Linear(sizes.width, sizes.width, bias=False) for _ in range(sizes.experts))
        self.shared = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.router(x).sigmoid().topk(self.chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=self.experts).tolist()
        for expert in range(self.experts):
            if counts[expert] == 0:
                continue
            rows, places = torch.where(indices == expert)
            out[rows] += F.silu(self.routed[expert](x[rows])) * weights[rows, places, None]
        return out + F.silu(self.shared(x))


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention, self.experts = Attention(sizes), Experts(sizes)
        self.norms = nn.ModuleList(nn.RMSNorm(sizes.width) for _ in range(2))

    def forward(self, x: Tensor, positions: Tensor, cu_seqlens: Tensor, slots: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), positions, cu_seqlens, slots)
        return x + self.experts(self.norms[1](x))


class DeepseekV4Skeleton(nn.Module):
    """One decode step for sequences that bring one token each."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)

    def forward(self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, slots: Tensor) -> Tensor:
        """Logits ``[tokens, vocabulary]``.

        Args:
            input_ids: int64 ``[tokens]``.
            positions: int64 ``[tokens]``, of each token in its sequence; 0 starts a new one in its slot.
            cu_seqlens: int64 ``[sequences + 1]``, where the tokens of each sequence begin.
            slots: int64 ``[sequences]``, where the state of each sequence is kept.
        """
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, positions, cu_seqlens, slots)
        return self.norm(x) @ self.embedding.weight.T


def schedule(sizes: Sizes, sequences: int, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Arguments of each step: sequences of different lengths; one that ends gives its slot up and another one starts."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    free = list(range(sizes.slots))
    slots = [free.pop() for _ in range(sequences)]
    positions, lengths = [0] * sequences, [draw(1, sizes.positions) for _ in range(sequences)]
    for _ in range(steps):
        ids = torch.randint(sizes.vocabulary, (sequences,), generator=generator)
        yield ids, torch.tensor(positions), torch.arange(sequences + 1), torch.tensor(slots)
        for sequence in range(sequences):
            positions[sequence] += 1
            if positions[sequence] == lengths[sequence]:
                free.insert(0, slots[sequence])
                slots[sequence] = free.pop()
                positions[sequence], lengths[sequence] = 0, draw(1, sizes.positions)
