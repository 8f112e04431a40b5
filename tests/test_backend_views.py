"""``torch.compile(backend="graphs")``: outputs that are views of inputs which share memory in one call and not in the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from graphs.dynamo.backend import backend_report

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _calls() -> list[tuple[Tensor, Tensor]]:
    packed = torch.arange(40.0)
    return [
        (packed[:4], packed[4:8]),
        (packed[:4], packed[10:14]),
        (packed[8:12], packed[:4]),
        (packed[:4], torch.full((4,), 100.0)),
        (torch.ones(4), torch.full((4,), 100.0)),
    ]


STEPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "slice": lambda a, b: (a * 2, b[:2]),
    "both": lambda a, b: (a[1:], b * 2, b[1:]),
    "part of several": lambda a, b: (a * 2, b.split(2)[1]),
    "view of a view": lambda a, b: (a * 2, b.view(2, 2).t()),
}


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", STEPS)
def test_a_view_is_of_its_own_input_wherever_the_inputs_of_the_first_call_lay(name: str, grad: Any) -> None:
    step = STEPS[name]
    compiled = torch.compile(step, backend="graphs", options={"compiler": "aten"})
    before = {piece.index for piece in backend_report().pieces}
    with grad():
        for a, b in _calls():
            for found, expected in zip(compiled(a, b), step(a, b), strict=True):
                assert torch.equal(found, expected)
                if expected.untyped_storage()._cdata in {t.untyped_storage()._cdata for t in (a, b)}:
                    assert found.data_ptr() == expected.data_ptr() and found.stride() == expected.stride()
    (piece,) = [piece for piece in backend_report().pieces if piece.index not in before]
    assert (piece.recordings, piece.replays, piece.refusals) == (1, 5, ())
