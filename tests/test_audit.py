"""Every kind of finding with its exact line, class and cure; the step is left as it was."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphs
from graphs.__main__ import main
from graphs.auditing.audit import Audit, Finding, audit
from tests.corpus.collection import CASES
from tests.parity import assert_same

Tensor = torch.Tensor
ROOT = Path(__file__).resolve().parents[1]


def at(found: Audit, marker: str) -> list[Finding]:
    """The findings of the line of this file that ends in ``# marker``."""
    lines = Path(__file__).read_text().splitlines()
    number = next(index for index, line in enumerate(lines, 1) if line.endswith(f"# {marker}"))
    here = [one for one in found.findings if (one.file, one.line) == (__file__, number)]
    assert all(one.source == lines[number - 1].strip() for one in here)
    return here


def one_at(found: Audit, marker: str) -> Finding:
    (one,) = at(found, marker)
    return one


class Decode(nn.Module):
    """Reads positions and slots as first written code does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kv", torch.zeros(4, 8, 3))

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        pos = int(positions[0].item())  # item
        for row, slot in enumerate(slots.tolist()):  # tolist
            self.kv[slot, pos % 8] = x[row]
        if pos == 0:
            self.kv.zero_()
        keys = self.kv[0, : pos + 1]
        limit = float(x.max())  # float
        scaled = keys * limit
        if x.sum() > 1e9:  # branch
            scaled = scaled + 1
        chosen = x[x > 0.5]  # mask
        rows = (x > 0.5).nonzero()  # nonzero
        table = torch.tensor([1.0, 2.0, 3.0])  # constant
        start = positions[0] % 4
        moved = x.new_zeros(8)[start : start + 2]  # window
        out = scaled.sum(0) + chosen.sum() + rows.sum() + table + moved.sum()
        return out.cpu()  # cpu


CALL = (torch.linspace(-1, 1, 6).view(2, 3), torch.tensor([5, 6]), torch.tensor([3, 1]))


@functools.cache
def of_decode() -> Audit:
    """One audit, which several tests look at."""
    return audit(Decode(), *CALL)


@pytest.mark.parametrize(
    ("marker", "kind", "function", "classes", "passes", "calls"),
    [
        ("item", "host-sync", "item", ("addressing", "bound", "control flow"), ("addressing", "bounded", "branches"), 1),
        ("tolist", "host-sync", "tolist", ("addressing",), ("addressing",), 1),
        ("float", "host-sync", "__float__", ("arithmetic",), ("arithmetic",), 1),
        ("branch", "data-dependent-branch", "__bool__", ("control flow",), ("branches",), 1),
        ("mask", "data-dependent-shape", "__getitem__", ("bound",), ("bounded",), 1),
        ("nonzero", "data-dependent-shape", "nonzero", ("bound",), ("bounded",), 1),
        ("constant", "host-constant", "tensor", ("host constant",), ("constants",), 1),
        ("window", "host-sync", "__getitem__", ("addressing", "bound"), ("addressing", "bounded"), 2),  # of two numbers
        ("cpu", "host-sync", "cpu", ("unsupported",), (), 1),
    ],
)
def test_each_kind_has_its_line_its_class_and_its_cure(
    marker: str, kind: str, function: str, classes: tuple[str, ...], passes: tuple[str, ...], calls: int
) -> None:
    one = one_at(of_decode(), marker)
    assert (one.kind, one.function, one.classes, one.passes, one.calls) == (kind, function, classes, passes, calls)
    assert one.cure and one.detail
    assert one.cost_us is not None and one.cost_us > 0


def test_nothing_else_is_found_and_the_order_is_that_of_the_step() -> None:
    found = of_decode()
    lines = [one.line for one in found.findings]
    assert len(found.findings) == 9 and lines == sorted(lines)
    assert found.cost == "time of calls" and found.device == "cpu" and found.steps == 2


class Counting(nn.Module):
    """Changes Python state and its cache in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 3
        self.scale = 1.0
        self.flip = False
        self.cache = torch.zeros(1, 2)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4.0)  # lazy
        self.length += 1  # counter
        self.scale *= 0.5  # decay
        self.flip = not self.flip  # flip
        self.cache = torch.cat([self.cache, x])  # grow
        ids = torch.arange(self.length)  # used
        x = x * self.scale  # scaled
        written = torch.tensor([self.length])  # upload
        y = x.exp() if self.flip else x.sin().cos()  # picked
        return y.sum() + ids.sum() + written + self.cache.sum(0)[0] + self.table.sum()  # sum


def test_every_value_that_changes_between_steps_is_listed() -> None:
    found = audit(Counting(), torch.ones(1, 2))
    assert found.steps == 3

    counter = one_at(found, "counter")
    assert (counter.kind, counter.operator, counter.detail) == ("changing-attribute", "self.length", "5, then 6")
    assert counter.passes == ("counters",)
    decay = one_at(found, "decay")
    assert (decay.operator, decay.detail, decay.passes) == ("self.scale", "0.25, then 0.125", ())

    used = [one for one in at(found, "used") if one.kind == "changing-scalar"]
    assert [(one.operator, one.detail, one.passes) for one in used] == [
        ("aten.arange.default", "end: 5, then 6, as self.length", ("counters",))
    ]
    assert one_at(found, "scaled").detail == "other: 0.25, then 0.125, as self.scale"

    grown = {one.kind: one for one in at(found, "grow")}
    assert grown["changing-shape"].detail == "shape of tensors: (2, 2), then (3, 2)"
    assert grown["changing-attribute"].operator == "self.cache"
    assert all(one.passes == () and "fixed capacity" in one.cure for one in grown.values())

    upload = one_at(found, "upload")
    assert (upload.kind, upload.detail, upload.passes) == ("host-constant", "data: [5], then [6]", ())
    assert upload.classes == ("host constant", "changing value")

    assert {one.kind for one in at(found, "picked")} == {"changing-operators"}
    assert one_at(found, "flip").kind == "changing-attribute"


def test_what_only_follows_and_what_happens_once_is_marked() -> None:
    found = audit(Counting(), torch.ones(1, 2))
    assert {one.kind for one in at(found, "sum")} == {"changing-shape", "changing-address"}  # of y, picked by a flag
    assert all(one.follows for one in at(found, "sum"))
    lazy = at(found, "lazy")
    assert {one.kind for one in lazy} == {"changing-operators", "changing-attribute"}
    assert all(one.once and one.passes == () for one in lazy)
    text = str(found)
    assert "in the first step only: test_audit.py" in text and "more sizes and numbers follow from these" in text


class OnState(nn.Module):
    """Branches on a tensor that the step advances."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        if self.step % 2 == 0:  # parity
            x = x.exp()  # side
        n = self.step.item()  # length
        return x[:n].sum()  # cut


def test_what_a_value_read_by_the_host_decides_follows_from_it() -> None:
    found = audit(OnState(), torch.ones(8))
    assert one_at(found, "parity").detail == "False, then True, then False"
    length = one_at(found, "length")
    assert (length.detail, length.classes) == ("1, then 2, then 3", ("bound",))
    (side,) = at(found, "side")
    assert side.kind == "changing-operators" and side.follows and f"line {one_at(found, 'parity').line}" in side.detail
    assert {one.kind for one in at(found, "cut")} == {"changing-address", "changing-scalar", "changing-shape"}
    assert all(one.follows for one in at(found, "cut"))


ticks = itertools.count()


def failing_on_the_second() -> Callable[[Tensor], Tensor]:
    calls: list[int] = []

    def step(x: Tensor) -> Tensor:
        calls.append(1)  # called
        if len(calls) > 1:
            raise ValueError("the cache is full")  # raised
        return x * int(x[0])  # read

    return step


def test_a_second_step_that_raises_still_gives_a_list() -> None:
    found = audit(failing_on_the_second(), torch.ones(2))
    raised = one_at(found, "raised")
    assert (raised.kind, raised.detail) == ("step-raised", "step 2 raised ValueError: the cache is full")
    assert one_at(found, "read").kind == "host-sync"
    assert one_at(found, "called").kind == "changing-attribute"


def test_what_the_first_step_raises_is_raised_and_undone() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(2))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.state += x
            self.calls += 1
            raise KeyError("nothing here")

    step = Step()
    with pytest.raises(KeyError, match="nothing here"):
        audit(step, torch.ones(2))
    assert step.calls == 0 and step.state.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("step", "x", "kind", "why"),
    [
        (lambda x: x.clone().resize_(2), torch.ones(3), "unsupported-operator", "move the operator out"),
        (lambda x: torch.linalg.inv(x), torch.eye(2), "host-sync", "does not check"),
        (lambda x: x.sum().item() + 0.0, torch.full((2,), 3.5), "host-sync", "return the tensor itself"),
        (lambda x: x + torch.frombuffer(bytearray(8), dtype=torch.float32), torch.ones(2), "changing-address", "copy_"),
        (lambda x: x * random.random(), torch.ones(2), "changing-scalar", "pass it as an argument"),
        (lambda x: {"scale": random.random()}, torch.ones(2), "changing-output", "return the tensor itself"),
        (lambda x: (x, object()), torch.ones(2), "unsupported-output", "return tensors"),
        (lambda x: x * next(ticks), torch.ones(2), "changing-attribute", "cannot be put back"),
    ],
)
def test_what_no_pass_takes_away_names_a_remedy(step: Callable[..., Any], x: Tensor, kind: str, why: str) -> None:
    found = {one.kind: one for one in audit(step, x).findings}
    assert kind in found
    assert found[kind].passes == () and why in found[kind].cure
    if found[kind].file:
        assert (found[kind].file, found[kind].line) == (__file__, inspect.getsourcelines(step)[1])


def test_a_number_that_makes_a_tensor_again_is_not_a_constant() -> None:
    def step(x: Tensor) -> Tensor:
        first = int(x[0])
        return x + torch.as_tensor([first])  # back

    back = one_at(audit(step, torch.tensor([4, 2])), "back")
    assert (back.kind, back.classes, back.passes) == ("host-constant", ("arithmetic",), ("arithmetic",))


def test_a_value_is_followed_into_the_functions_it_is_passed_to() -> None:
    class Step(nn.Module):
        def row(self, x: Tensor, slot: int) -> Tensor:
            return x[slot]

        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            for slot in slots.tolist():  # passed
                x = x + self.row(x, slot)
            return x

    assert one_at(audit(Step(), torch.ones(3, 3), torch.tensor([1])), "passed").classes == ("addressing",)


def test_calls_are_counted_per_step() -> None:
    def step(x: Tensor) -> Tensor:
        for row in x:
            if row.sum() > 0:  # each
                x = x + 1
        return x

    each = one_at(audit(step, torch.tensor([[1.0], [-1.0], [2.0]])), "each")
    assert each.calls == 3 and each.detail == "True, False, True"


UNHINDERED = {"repeat_interleave_to_a_known_size", "a_number_that_the_caller_knows"}
"""Cases that have nothing to find: the caller gives the length."""


def test_no_case_of_the_corpus_is_missed() -> None:
    missed = set()
    for case in CASES:
        file, lines = case.lines()
        found = audit(case.build(), *case.inputs(3)).findings
        if not any(one.file == file and one.line in lines for one in found):
            missed.add(case.name)
    assert missed == UNHINDERED


def test_the_step_is_left_as_it_was() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(2))
            self.lengths = {"a": 1}
            self.history: list[float] = []
            self.made: Tensor | None = None

        def forward(self, x: Tensor, out: Tensor) -> Tensor:
            self.seen += x + torch.rand(2)
            self.lengths["a"] += 1
            self.history.append(random.random() + np.random.rand())
            self.made = self.seen * 2 if self.made is None else self.made
            self.made += 1
            out.fill_(float(self.seen[0]))
            return self.seen.clone()

    step, out = Step(), torch.zeros(2)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = copy.deepcopy((dict(step.named_buffers()), step.lengths, step.history))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = audit(step, torch.ones(2), out)
    assert found.findings
    assert_same(before, (dict(step.named_buffers()), step.lengths, step.history), "state")
    assert step.made is None and out.tolist() == [0, 0]
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])


def test_a_step_without_findings_says_so() -> None:
    found = audit(nn.Linear(3, 3), torch.ones(3))
    assert found.findings == () and found.steps == 2
    assert "can be recorded as it is" in str(found)


def test_a_captured_module_stands_for_its_model() -> None:
    step = graphs.capture(Decode())
    assert [one.line for one in audit(step, *CALL).findings] == [one.line for one in of_decode().findings]
    assert step.report().recordings == 0 and step.report().eager_calls == 0


def test_a_sparse_argument_is_refused_by_name() -> None:
    with pytest.raises(graphs.Refusal, match="unsupported-argument"):
        audit(lambda x: x, torch.eye(2).to_sparse())


def test_json_holds_everything_and_comes_back() -> None:
    found = audit(Counting(), torch.ones(1, 2))
    assert Audit.from_json(found.to_json()) == found
    plain = json.loads(found.to_json())
    assert set(plain) == {"device", "operators", "steps", "cost", "findings"}
    assert plain["findings"][0]["file"] == __file__


def test_the_text_shows_lines_values_and_remedies() -> None:
    text = str(of_decode())
    item = one_at(of_decode(), "item")
    assert f"  {item.line}   pos = " in text and "int(positions[0].item())" in text
    assert "tests/test_audit.py" in text and "remedy: the value leaves the" in text
    assert "9 findings: passes apply to 8; 1 need the remedy named." in text
    assert all(len(line) <= 80 for line in text.splitlines()) and "\x1b" not in text


FACTORY = """
import torch


def step(x):
    if x.sum() > 0:
        x = x + 1
    return x


def factory():
    return step, (torch.ones(2),)
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A module in a temporary directory with the factory of a step."""
    path = tmp_path / "steps_to_audit.py"
    path.write_text(FACTORY)
    return path


def test_the_command_prints_a_table(module: Path) -> None:
    command = [sys.executable, "-m", "graphs", "audit", "steps_to_audit:factory"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=module.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "steps_to_audit.py" in done.stdout and "6   if x.sum() > 0:" in done.stdout and "branches" in done.stdout


def test_the_command_prints_json(module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(module.parent)
    monkeypatch.delitem(sys.modules, "steps_to_audit", raising=False)
    with pytest.raises(SystemExit) as done:
        main(["audit", "steps_to_audit:factory", "--json"])
    assert not done.value.code
    (one,) = Audit.from_json(capsys.readouterr().out).findings
    assert (one.kind, one.file, one.line) == ("data-dependent-branch", str(module), 6)


def scaled(x: Tensor) -> Tensor:
    return x * x.sum().item()  # times


def reshaped(x: Tensor) -> Tensor:
    return torch.ones(12).view(int(x[0].abs()) + 1, -1)  # reshaped


@pytest.mark.parametrize(("model", "marker"), [(scaled, "times"), (reshaped, "reshaped")])
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_an_audit_promises_what_a_capture_keeps(model: Callable[..., Any], marker: str) -> None:
    x = torch.tensor([1.0, 5.0, 2.0])
    found = audit(model, x)
    step = graphs.capture(model)
    step(x)
    refused = {(refusal.file, refusal.line) for refusal in step.report().refusals}
    for one in at(found, marker):
        assert bool(one.passes) == ((one.file, one.line) not in refused)
        assert one.passes or "no pass takes it here" in one.cure
    assert at(found, marker) and bool(refused) == (model is reshaped)


def raised_to(x: Tensor) -> Tensor:
    return x ** x[0].item()  # exponent


def counted(x: Tensor) -> Tensor:
    return torch.bincount(x.long(), minlength=8) * 2  # bincount


def in_a_list(x: Tensor) -> Tensor:
    return x[[int(x[0])]]  # list


def with_a_rest(x: Tensor) -> Tensor:
    return x[int(x[0]) :].sum()  # rest


@pytest.mark.parametrize(
    ("model", "marker", "by"),
    [
        (raised_to, "exponent", ("branches",)),  # some exponents have kernels of their own
        (counted, "bincount", ("branches",)),  # as many bins as in the eager run, which a replay checks
        (in_a_list, "list", ("arithmetic",)),  # a tensor is made of it, on the device
        (with_a_rest, "rest", ("addressing", "bounded")),
    ],
)
def test_the_passes_are_those_that_take_the_value(model: Callable[..., Any], marker: str, by: tuple[str, ...]) -> None:
    assert at(audit(model, torch.tensor([1.0, 5.0, 2.0])), marker)[0].passes == by


def unbounded(x: Tensor) -> Tensor:
    n = int(x[0])  # unbounded
    return x.new_zeros(n).sum() + x


def test_a_value_without_a_bound_is_named_where_it_is_read() -> None:
    one = one_at(audit(unbounded, torch.tensor([1.0, 5.0])), "unbounded")
    assert one.classes == ("bound",) and one.passes == ()
    assert f"no pass takes it in line {one.line + 1}: a length" in one.cure and "bounds={" in one.cure


def logging(x: Tensor) -> Tensor:
    n = int(x[0])  # before the text
    shown = int(x[1])  # shown
    row = x[n]
    str.format("{}", f"{shown}")
    return row * int(x[-1])  # behind the text


def test_a_step_that_cannot_be_traced_to_its_end_is_told_of_as_far_as_it_can() -> None:
    found = audit(logging, torch.tensor([1.0, 5.0, 7.0]))
    assert one_at(found, "before the text").passes == ("addressing",)
    shown = one_at(found, "shown")
    assert shown.classes == ("unsupported",) and shown.passes == () and "the value leaves the step" in shown.cure
    assert one_at(found, "behind the text").classes == ("arithmetic",)


def test_a_step_that_counts_is_told_of_as_well() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            index = int(x[0])
            return x.roll(index, 0) + self.calls

    one = next(one for one in audit(Step(), torch.tensor([1.0, 5.0])).findings if one.kind == "host-sync")
    assert one.classes == ("arithmetic",) and one.source == "index = int(x[0])"
