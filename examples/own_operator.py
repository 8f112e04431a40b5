"""An operator of your own in a captured step: declared with ``register_op``, checked with ``capture_check``.

    python examples/own_operator.py

The operator lowers the logits of tokens that were decoded already, and counts them in a tensor that it writes in place. The
body may as well launch a Triton kernel or call an extension: what counts is that ``mutates_args`` names what it writes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphs

VOCABULARY, WIDTH, BATCH = 256, 64, 4


@graphs.register_op(
    name="example::penalise_repeats",
    mutates_args=("counts",),
    fake=lambda logits, last, counts, penalty: torch.empty_like(logits),  # shapes and dtypes alone, for compilers
)
def penalise_repeats(logits: Tensor, last: Tensor, counts: Tensor, penalty: float) -> Tensor:
    """Count ``last [batch]`` in ``counts [batch, vocabulary]``; return ``logits`` less ``penalty`` for each time."""
    counts.scatter_add_(1, last[:, None], torch.ones_like(logits[:, :1]))
    return logits - penalty * counts


class Sampler(nn.Module):
    """The next token of each sequence, from the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.logits = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("counts", torch.zeros(BATCH, VOCABULARY))

    def forward(self, last: Tensor) -> Tensor:
        """Token ids ``[batch]`` to token ids ``[batch]``, int64."""
        logits = self.logits(self.embedding(last))
        return penalise_repeats(logits, last, self.counts, 0.25).argmax(-1)


def decode(step: nn.Module, model: Sampler, device: str) -> Tensor:
    """Sixteen tokens for each sequence, from empty counts."""
    model.counts.zero_()
    tokens = [torch.arange(BATCH, device=device)]
    for _ in range(16):
        tokens.append(step(tokens[-1]))
    return torch.stack(tokens, dim=1)


def main() -> None:
    """Check the operator, then decode eagerly and captured, and compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    logits, counts = torch.randn(BATCH, VOCABULARY, device=device), torch.zeros(BATCH, VOCABULARY, device=device)
    graphs.capture_check(penalise_repeats, (logits, torch.arange(BATCH, device=device), counts, 0.25))
    print("capture_check found nothing")

    model = Sampler().eval().to(device)
    step = graphs.capture(model)
    with torch.no_grad():
        expected = decode(model, model, device)
        tokens = decode(step, model, device)
    if not torch.equal(tokens, expected):
        raise SystemExit("the tokens differ")
    print(f"{tokens.numel()} tokens on {device}, the same eager and replayed")
    print(step.report())


if __name__ == "__main__":
    main()
