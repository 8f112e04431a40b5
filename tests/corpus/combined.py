"""Several patterns in one step, as in real decode paths."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.corpus.case import REORDERED, case, choice, mask, noise, number, whole


@case(lambda i: (noise(i, 4), torch.tensor(i)), tolerance=REORDERED, merged=True)
class AttentionOverAGrowingCache(nn.Module):
    """The position addresses, bounds a length, and resets."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(24, 4))
        self.register_buffer("values", torch.zeros(24, 4))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        start_pos = int(position)
        if start_pos == 0:
            self.keys.zero_()
            self.values.zero_()
        self.keys[start_pos], self.values[start_pos] = x, x.tanh()
        end_pos = start_pos + 1
        scores = self.keys[:end_pos] @ x * 0.5
        return scores.softmax(-1) @ self.values[:end_pos]


@case(lambda i: (noise(i, 2, 4), torch.tensor([i, (3 * i + 5) % 20])), tolerance=REORDERED, merged=True)
class CompressedAttention(nn.Module):
    """Window ring, an entry per four tokens, and the best entries of those committed, one sequence after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.ratio, self.top = 4, 4, 2
        self.register_buffer("ring", torch.zeros(2, 4, 4))
        self.register_buffer("entries", torch.zeros(2, 6, 4))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        out = []
        for sequence, start_pos in enumerate(positions.tolist()):
            if start_pos == 0:
                self.ring[sequence] = 0
            self.ring[sequence, start_pos % self.window] = x[sequence]
            end_pos = start_pos + 1
            if end_pos % self.ratio == 0:
                self.entries[sequence, end_pos // self.ratio - 1] = self.ring[sequence].mean(0)
            n_committed = end_pos // self.ratio
            committed = self.entries[sequence, :n_committed]
            best = (committed @ x[sequence]).topk(min(self.top, n_committed)).indices
            keys = torch.cat([self.ring[sequence, : min(end_pos, self.window)], committed[best]])
            out.append((keys @ x[sequence]).softmax(0) @ keys)
        return torch.stack(out)


@case(lambda i: (noise(i, 3, 8), number(i).abs() if i % 3 else torch.tensor(0.0), whole(i, 1, 9)), merged=True)
def sampling_settings(logits: Tensor, temperature: Tensor, k: Tensor) -> Tensor:
    if temperature.item() == 0:
        return logits.argmax(-1)
    scaled = logits / temperature.item()
    kept = scaled.sort(descending=True).values[:, int(k) - 1].unsqueeze(1)
    return scaled.masked_fill(scaled < kept, float("-inf")).softmax(-1).argmax(-1)


@case(lambda i: (choice(i, 4, 2), choice(i, 4, 2, salt=1), noise(i, 4, 2)), merged=True)
class AcceptedDraftTokens(nn.Module):
    """As many rows are kept as leading tokens agree."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("accepted", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rows", torch.zeros(4, 2))

    def forward(self, draft: Tensor, target: Tensor, x: Tensor) -> Tensor:
        n = int((draft == target).cumprod(0).sum())
        self.accepted += n
        self.rows[:n] = x[:n]
        if n < draft.shape[0]:
            self.rows[n] = -x[n]
        return self.rows.clone()


@case(lambda i: (noise(i, 4, 3), mask(i, 4)), tolerance=REORDERED, merged=True)
class OnlyActiveRequestsAdvance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lengths", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("states", torch.zeros(4, 3))

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        if not active.any():
            return self.states * 0
        slots = active.nonzero().squeeze(-1)
        self.states[slots] = self.states[slots] * 0.9 + x[slots]
        self.lengths[active] += 1
        longest = int(self.lengths.max())
        return self.states / longest + self.lengths.float().mean()


@case(lambda i: (noise(i, 6, 3), choice(i, 6, 3), number(i)), tolerance=REORDERED)
class GroupsWithAThreshold(nn.Module):
    """A mask in a branch in a loop over ids found by ``unique``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(3, 3))

    def forward(self, x: Tensor, ids: Tensor, threshold: Tensor) -> Tensor:
        for group in torch.unique(ids).tolist():
            rows = x[ids == group]
            if rows.sum() > threshold:
                self.means[group] = rows.mean(0)
        return self.means * 2


@case(lambda i: (noise(i, 3), whole(i, 0, 3), number(i)), merged=True)
class CountersHostsAndItems(nn.Module):
    """A Python counter, a host constant, an item and a branch together."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("log", torch.zeros(48, 3))

    def forward(self, x: Tensor, kind: Tensor, scale: Tensor) -> Tensor:
        weights = torch.tensor([0.5, 1.0, 2.0], device=x.device)
        x = x * weights[kind.item()]
        if scale > 0:
            x = x * float(scale)
        self.log[self.calls] = x
        self.calls += 1
        return self.log.amax(0) + self.calls


@case(lambda i: (noise(i, 3, 4), noise(i, 3, 5, salt=1), torch.tensor(i % 10)), tolerance=REORDERED, merged=True)
class BeamSearch(nn.Module):
    """Beams are reordered by what was best, and finished ones stay."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("history", torch.zeros(3, 10, dtype=torch.int64))
        self.register_buffer("scores", torch.zeros(3))

    def forward(self, x: Tensor, logits: Tensor, position: Tensor) -> Tensor:
        step = position.item()
        if step == 0:
            self.history.zero_()
            self.scores.zero_()
        candidates = self.scores.unsqueeze(1) + logits.log_softmax(-1)
        values, flat = candidates.flatten().topk(3)
        beams, tokens = flat // logits.shape[1], flat % logits.shape[1]
        self.history.copy_(self.history[beams])
        self.history[:, step] = tokens
        self.scores.copy_(values)
        return x[beams] + self.history[:, : step + 1].float().mean(1, keepdim=True)
