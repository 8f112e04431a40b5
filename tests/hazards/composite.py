"""Host reads behind composite operators, which a dispatch mode sees undecomposed in inference mode."""

from __future__ import annotations

import torch
from torch import nn

from tests.hazards.case import AUTOCAST, INFERENCE, NO_GRAD, Run, hazard, noise, steps, whole

Tensor = torch.Tensor
ALL = (NO_GRAD, INFERENCE, AUTOCAST, "autocast+inference_mode")


def branch(x: Tensor, t: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x - 1


def several_branches(x: Tensor, t: Tensor) -> Tensor:
    if t > 2:
        return x * 2
    elif t == 1:
        return x + 5
    elif x.max() > 1:
        return x - 1
    return x


def conditional_expression(x: Tensor, t: Tensor) -> Tensor:
    return x * 2 if t % 2 == 0 else x - x.mean()


def branch_after_linear(x: Tensor, t: Tensor) -> Tensor:
    y = nn.functional.linear(x, torch.ones(4, 4, device=x.device))
    return y.relu() if y.mean() > 0 else y * 3


def loop_to_a_number(x: Tensor, t: Tensor) -> Tensor:
    for _ in range(int(t)):
        x = x * 2 + 1
    return x


def loop_while(x: Tensor, t: Tensor) -> Tensor:
    while t > 0:
        x, t = x + 1, t - 1
    return x


def item_as_factor(x: Tensor, t: Tensor) -> Tensor:
    return x * x[0, 0].item()


def truth_by_operator(x: Tensor, t: Tensor) -> Tensor:
    return x + 1 if torch.is_nonzero(t) else x - 1


def any_and_all(x: Tensor, t: Tensor) -> Tensor:
    y = x * 2 if (x > 1.5).any() else x
    return y + 1 if bool((y < 2.5).all()) else y - 1


def rows_by_mask(x: Tensor, t: Tensor) -> Tensor:
    return x[x.sum(1) > 0].sum(0)


def compared_tensors(x: Tensor, t: Tensor) -> Tensor:
    return x * 3 if torch.equal(t, torch.ones_like(t)) else x


def elements_as_list(x: Tensor, t: Tensor) -> Tensor:
    return x * sum(x[0].tolist())


def row_at_a_number(x: Tensor, t: Tensor) -> Tensor:
    return x[int(t) % 3] + x[t.item() % 3]


steps(
    "A",
    *(branch, several_branches, conditional_expression, branch_after_linear, loop_to_a_number, loop_while, item_as_factor),
    *(truth_by_operator, any_and_all, rows_by_mask, compared_tensors, elements_as_list, row_at_a_number),
    arguments=lambda i: (noise(i, 3, 4), torch.tensor((i * 5 + 2) % 4)),
    contexts=ALL,
    calls=7,
)


class Experts(nn.Module):
    """Tokens go to the expert that is named for them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == k)
            out.index_add_(0, rows, expert(x[rows]).to(out.dtype))
        return out


class FewExperts(Experts):
    """Only the experts that some token asked for run."""

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in chosen.unique().tolist():
            rows = (chosen == k).nonzero()[:, 0]
            out[rows] = self.experts[k](x[rows]).to(out.dtype)
        return out


@hazard("A", contexts=ALL)
def experts(device: torch.device) -> Run:
    return Run(Experts().eval().to(device), lambda i: (noise(i, 5, 4, device=device), whole(i, 3, 5, device=device)))


@hazard("A", contexts=ALL)
def experts_that_are_used(device: torch.device) -> Run:
    return Run(FewExperts().eval().to(device), lambda i: (noise(i, 5, 4, device=device), whole(i, 3, 5, device=device)))


@hazard("A", contexts=ALL, replays=3)
def transformer_encoder_layer(device: torch.device) -> Run:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().to(device)
    return Run(layer, lambda i: (noise(i, 2, 3, 8, device=device),))


@hazard("A", contexts=ALL, replays=3)
def transformer_encoder_with_padding(device: torch.device) -> Run:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().to(device)
    return Run(model, lambda i: (noise(i, 2, 3, 8, device=device),))


@hazard("A", contexts=ALL, replays=3)
def products_and_convolutions(device: torch.device) -> Run:
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.Flatten(1), nn.Linear(16, 4), nn.LayerNorm(4), nn.GELU())
    return Run(model.eval().to(device), lambda i: (noise(i, 2, 3, 4, device=device),))
