"""Mixture-of-experts loops as they are found in public models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.corpus.case import PADDED_GEMM, case, noise

TOKENS, WIDTH, EXPERTS, CHOSEN = 5, 4, 4, 2


class Routed(nn.Module):
    """A router and `EXPERTS` two-layer experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.up = nn.Parameter(torch.randn(EXPERTS, 6, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 6))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids ``[tokens, CHOSEN]``."""
        weights, indices = (x @ self.router.T).softmax(-1).topk(CHOSEN)
        return weights / weights.sum(-1, keepdim=True), indices

    def expert(self, x: Tensor, index: int | Tensor) -> Tensor:
        return F.silu(x @ self.up[index].T) @ self.down[index].T


def tokens(i: int) -> tuple[Tensor]:
    """Tokens that lean to one expert at some steps, so that others get none."""
    x = noise(i, TOKENS, WIDTH)
    return (x + 3 * noise(i, WIDTH, salt=1) if i % 2 else x,)


@case(tokens, tolerance=PADDED_GEMM, merged=True)
class CountsAsAListAndContinue(Routed):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.route(x)
        out = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=EXPERTS).tolist()
        for e in range(EXPERTS):
            if counts[e] == 0:
                continue
            rows, slots = torch.where(indices == e)
            out[rows] += self.expert(x[rows], e) * weights[rows, slots, None]
        return out


@case(tokens, tolerance=PADDED_GEMM)
class WhereWithoutCounts(Routed):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.route(x)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            rows, slots = torch.where(indices == e)
            out.index_add_(0, rows, self.expert(x[rows], e) * weights[rows, slots].unsqueeze(-1))
        return out


@case(tokens, tolerance=PADDED_GEMM, merged=True)
class ALoopOverExpertsThatWereHit(Routed):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.route(x)
        out = torch.zeros_like(x)
        expert_mask = F.one_hot(indices, num_classes=EXPERTS).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            slots, rows = torch.where(expert_mask[expert_idx])
            out.index_add_(0, rows, self.expert(x[rows], expert_idx) * weights[rows, slots, None])
        return out


@case(tokens, tolerance=PADDED_GEMM, merged=True)
class MasksAndAny(Routed):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.route(x)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            hit = indices == e
            if not hit.any():
                continue
            rows = hit.any(-1)
            out[rows] += self.expert(x[rows], e) * weights[rows][hit[rows]].unsqueeze(-1)
        return out


@case(tokens, tolerance=PADDED_GEMM)
class SortedAndSplitByAList(Routed):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.route(x)
        sizes = torch.zeros(x.shape[0], EXPERTS, device=x.device).scatter(1, indices, 1).long().sum(0).tolist()
        order = indices.flatten().argsort(stable=True)
        rows = order.div(CHOSEN, rounding_mode="trunc")
        parts = [self.expert(part, e) for e, part in enumerate(x[rows].split(sizes))]
        mixed = torch.cat(parts) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, rows, mixed)


@case(tokens, tolerance=PADDED_GEMM)
class SlicesBetweenOffsets(Routed):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.route(x)
        order = indices.view(-1).argsort(stable=True)
        grouped, outputs, start = x[order // CHOSEN], [], 0
        for e, count in enumerate(torch.bincount(indices.view(-1), minlength=EXPERTS).cpu().numpy()):
            end = start + int(count)
            if start == end:
                continue
            outputs.append(self.expert(grouped[start:end], e))
            start = end
        unsorted = torch.empty_like(grouped)
        unsorted[order] = torch.cat(outputs)
        return (unsorted.view(*indices.shape, -1) * weights.unsqueeze(-1)).sum(1)


@case(tokens)
class OneTokenAtATime(Routed):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.route(x)
        out = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for slot, e in enumerate(indices[token].tolist()):
                out[token] += weights[token, slot] * self.expert(x[token : token + 1], e)[0]
        return out


@case(tokens, tolerance=PADDED_GEMM)
class UniqueExperts(Routed):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.route(x)
        out = torch.zeros_like(x)
        for e in indices.unique():
            chosen = indices == e
            gate = (weights * chosen).sum(-1)
            rows = chosen.any(-1).nonzero().squeeze(-1)
            out[rows] = out[rows] + gate[rows, None] * self.expert(x[rows], int(e))
        return out
