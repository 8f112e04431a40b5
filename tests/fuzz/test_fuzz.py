"""A short run of the fuzzer: hypothesis draws the seeds, and programs that fail are made smaller by the fuzzer's own shrinker."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install 'stepgraphs[dev]'")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.grammar import generate
from tests.fuzz.lockstep import run
from tests.fuzz.program import Block, Program
from tests.fuzz.shrink import shrink

SHORT = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


@SHORT
@given(st.integers(0, 2**32 - 1))
def test_a_random_program_is_what_eager_is(seed: int) -> None:
    program = generate(seed)
    outcome = run(program)
    if outcome.failed:
        smaller = shrink(program, lambda one: run(one).kind == outcome.kind, 60)
        pytest.fail(f"seed {seed}, {outcome.kind}: {outcome.detail}\n{smaller.script()}")


def test_a_seed_makes_one_program() -> None:
    assert generate(5) == generate(5) and generate(5) != generate(6)


def test_every_program_is_one() -> None:
    for seed in range(300):
        compile(generate(seed).source(), "program", "exec")


def test_a_difference_is_found_and_the_program_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    body = ("v = v + 1", Block((("if x.sum() > 0:", ("a = a * 2", "b = b + 1")), ("else:", ("a = a - 1",)))), "v = v * 2")
    program = Program(body, "a, v", changes=((3, "step.scale = 2.0"),), contexts=("no_grad", "inference_mode"), calls=6)
    smaller = shrink(program, lambda one: "a - 1" in one.source() and one.calls > 2)
    assert (smaller.body, smaller.result, smaller.changes) == (("a = a - 1",), "a", ())
    assert (smaller.contexts, smaller.calls) == (("no_grad",), 3)


def test_a_captured_twin_that_is_wrong_is_told() -> None:
    program = Program(("self.count += 1", "a = a * self.count"), "a", calls=4)
    assert run(program).kind == "same"
    assert run(Program(("a = undefined",), "a")).kind == "invalid"
    drawn = Program(("a = torch.rand_like(x)",), "a", calls=4)
    assert run(drawn).kind == "same"


def test_random_states_are_the_runs_own() -> None:
    before = torch.get_rng_state(), random.getstate()
    run(Program(("a = torch.rand_like(x)",), "a, random.random()", calls=3))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
