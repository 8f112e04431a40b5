"""What no recording can do: output, results that are Python values, effects that depend on the device."""

from __future__ import annotations

import io

from torch import Tensor, nn

from tests.corpus.case import case, mask, noise, number, whole

SINK = io.StringIO()


@case(lambda i: (noise(i, 3),), "side-effect")
def printing(x: Tensor) -> Tensor:
    print(x.sum(), file=SINK)
    return x * 2


@case(lambda i: (noise(i, 3), number(i)), "host-sync")
def an_f_string(x: Tensor, loss: Tensor) -> Tensor:
    SINK.write(f"loss {loss:.3f}\n")
    return x + loss


@case(lambda i: (noise(i, 3), whole(i, 0, 4)), "host-sync")
def a_python_number_is_returned(x: Tensor, count: Tensor) -> tuple[Tensor, int]:
    return x * 2, int(count)


@case(lambda i: (noise(i, 3),), "host-sync")
def a_list_is_returned(x: Tensor) -> list[float]:
    return (x * 2).tolist()


@case(lambda i: (noise(i, 4), mask(i, 4)), "host-sync")
class ALogOfWhatHappened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.accepted: list[int] = []

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        self.accepted.append(int(keep.sum()))
        return x * keep


@case(lambda i: (noise(i, 4), mask(i, 4)), "host-sync")
def a_set_of_items(x: Tensor, keep: Tensor) -> Tensor:
    kinds = {f"{flag}" for flag in keep.tolist()}
    SINK.write(str(len(kinds)))
    return x + 1


@case(lambda i: (noise(i, 3), whole(i, 0, 3)), "host-sync")
def text_picks_a_constant(x: Tensor, kind: Tensor) -> Tensor:
    weights = {"kind 0": 0.5, "kind 1": 1.5, "kind 2": 2.5}
    return x * weights[f"kind {kind.item()}"]
