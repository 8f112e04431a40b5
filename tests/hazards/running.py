"""Driving a hazard: equal to eager at every call, and every eager call named."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.parity.compare import call_difference
from graphs.parity.twins import Called, entered
from graphs.parity.walk import reached
from tests.hazards.case import Hazard, Run
from tests.parity import copied

ROOT = Path(__file__).resolve().parents[2]


def check(hazard: Hazard, context: str, device: torch.device) -> None:
    """Run both twins, the eager one first; in a process of its own where the hazard asks for one."""
    if hazard.isolated:
        command = [sys.executable, "-m", "tests.hazards.alone", hazard.name, context, str(device)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    else:
        check_here(hazard, context, device)


_NOT_OF_THE_STEP = ("._is_torch_compile", "._idle_semaphore._value", "._dim_group_names[0]")
"""What torch.compile hangs on the function it is given, here the captured step; when a thread is idle; names counted up."""


def check_here(hazard: Hazard, context: str, device: torch.device) -> None:
    """Run both twins in this process."""
    expected, finally_expected, _ = _driven(hazard, context, device, captured=False)
    got, finally_got, report = _driven(hazard, context, device, captured=True)
    for index, (wanted, made) in enumerate(zip(expected, got, strict=True)):
        found = call_difference(wanted, made)
        assert found is None, f"call {index}: {found[0]} {found[1]}\n{report}"
    assert finally_expected == finally_got, report
    assert report is not None
    named = sum(refusal.count for refusal in report.refusals)
    assert report.eager_calls <= named + 1, f"an eager call has no name\n{report}"  # one may initialise what is lazy
    assert report.replays >= hazard.replays, f"{report.replays} replays, wanted {hazard.replays}\n{report}"


def _driven(
    hazard: Hazard, context: str, device: torch.device, *, captured: bool
) -> tuple[list[Called], Any, graphs.CaptureReport | None]:
    torch.manual_seed(0)
    random.seed(0)
    run = hazard.make(device)
    step = graphs.capture(run.step, **hazard.settings) if captured else run.step
    called = run.wrap(step) if run.wrap is not None else step
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotReplayed)
            warnings.filterwarnings("ignore", module="torch")
            results = list(_calls(hazard, context, device, run, called))
        return results, run.after() if run.after is not None else None, step.report() if captured else None
    finally:
        if run.restore is not None:
            run.restore()


def _calls(hazard: Hazard, context: str, device: torch.device, run: Run, called: Any) -> Iterator[Called]:
    torch.manual_seed(1)
    for index in range(hazard.calls):
        if run.change is not None:
            run.change(index)
        arguments = run.arguments(index)
        output, raised = None, None
        with entered(context, device):
            try:
                output = called(*arguments)
            except Exception as error:
                raised = error
        cells = [cell for cell in reached({"step": run.step}).cells if not cell.path.endswith(_NOT_OF_THE_STEP)]
        leaves = {cell.path: copied(cell.value) for cell in cells}
        leaves["arguments"] = [copied(one) for one in arguments if isinstance(one, torch.Tensor)]
        leaves["random state"] = torch.get_rng_state()
        arguments = ()  # so that the next call's containers may take the addresses of these
        yield Called(copied(_plain(output)), raised, leaves)


def _plain(output: Any) -> Any:
    """Dataclasses as dictionaries, with the name of their class."""
    if dataclasses.is_dataclass(output) and not isinstance(output, dict):
        return {"class": type(output).__name__, **{one.name: getattr(output, one.name) for one in dataclasses.fields(output)}}
    return output
