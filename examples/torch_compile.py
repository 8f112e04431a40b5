"""``torch.compile(backend="graphs")``: for a program that calls ``torch.compile`` already.

    python examples/torch_compile.py

Installing stepgraphs registers the backend, so nothing of it has to be imported to use it; ``graphs`` is imported here for the
report. Each graph that Dynamo makes of the model is compiled, recorded and replayed; what the model writes is written in place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphs


class Block(nn.Module):
    """A gated feed-forward layer that keeps a running mean of its input."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, width]`` to ``[batch, width]``; writes ``mean``."""
        self.mean.lerp_(x.mean(0), 0.1)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x - self.mean))


def main() -> None:
    """Run a compiled block and an eager twin on the same inputs, and compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, twin = Block().eval().to(device), Block().eval().to(device)
    twin.load_state_dict(model.state_dict())

    # Inductor is the default; "aten" leaves the operators as they are, and needs no compiler for C++
    compiler = "inductor" if device == "cuda" else "aten"
    compiled = torch.compile(model, backend="graphs", options={"compiler": compiler})
    with torch.no_grad():
        for _ in range(8):
            x = torch.randn(4, 64, device=device)
            torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(model.mean, twin.mean)
    print(f"8 calls on {device}, the same eager and compiled")
    print(graphs.backend_report())


if __name__ == "__main__":
    main()
