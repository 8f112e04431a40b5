"""``graphs.accelerate(model, compiler="inductor")``: the step of a generation is compiled, and says so where it is not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'stepgraphs[hf]'")

from transformers import StaticCache

import graphs
from graphs.generation.decode_step import DecodeStep
from tests.test_accelerate import same, twins

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dynamo_goes_through_a_whole_call_of_an_accelerated_model(name: str) -> None:
    model, twin = twins(name)
    arguments = {"input_ids": torch.tensor([[7]])}
    results = []
    for one in (torch.compile(DecodeStep(model), backend="eager", fullgraph=True), twin):
        cache = StaticCache(config=twin.config, max_cache_len=16)
        with torch.no_grad():
            results.append(one(**arguments, past_key_values=cache).logits)
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_a_generation_is_compiled_where_that_is_asked_for() -> None:
    model, twin = twins("llama", compiler="inductor")
    for turn in range(2):
        same(model, twin, turn)
    report = graphs.accelerated_report(model)
    assert not report.refusals
    assert [key.compiler for key in report.keys] == ["inductor"], report
