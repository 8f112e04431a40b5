"""Milliseconds and kernels of a decode step of DeepSeek-V4 in each form; what comes out is checked before anything is timed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

import graphs
from graphs.bench.choices import COMPILED_STEP_FORMS, STEP_FORMS
from graphs.bench.compile.inductor import several_ways
from graphs.bench.deepseek_v4.kinds import by_kind, kernels_of
from graphs.bench.deepseek_v4.model import LAYERS, build_deepseek
from graphs.bench.generate.measure import Form, settle
from graphs.bench.generate.models import Workload
from graphs.bench.harness.machine import describe_machine
from graphs.bench.harness.progress import Progress
from graphs.bench.harness.rows import BarRow, BenchRow
from graphs.bench.harness.sampling import Spread, Variant, wall_seconds, wall_variants
from graphs.bench.settings import BenchSettings
from graphs.compiler_options import REWRITES
from graphs.errors import ConfigError

STEP_MS, KERNELS = (3.5, 1.5), (100, 50)
"""Limit and goal on a GPU: of a recorded step, and of its kernels per layer."""
ADDED: dict[str, tuple[str, ...]] = {
    "inductor": (),
    "+experts": ("expert_products", "repeated_heads"),
    "+products": ("skinny_products", "one_query_attention"),
    "+mhc": ("hyper_connections",),
    "+around": ("norm_prologues", "product_epilogues"),
}
"""The rewrites that each compiled form has beside those of the form before it."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One form of the model.

    Attributes:
        tokens: generates so many tokens; the step's time is that of one call more.
    """

    form: Form
    model: Any
    workload: Workload

    def tokens(self, ids: torch.Tensor, new: int) -> Any:
        """What ``generate()`` gives."""
        return self.model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def workload_for(device: torch.device) -> Workload:
    """What is generated: 17 tokens on a GPU, of which the last 16 are steps."""
    if device.type == "cuda":
        return Workload(f"DeepSeek-V4 of {LAYERS} layers, V4-Flash width", build_deepseek, 4, 128, 17)
    return Workload("toy DeepSeek-V4 of 2 layers", functools.partial(build_deepseek, layers=2), 2, 16, 5)


def chosen_step_forms(settings: BenchSettings) -> tuple[str, ...]:
    """The forms of a run: those that were asked for, else all that the device can run.

    Raises:
        ConfigError: one of them is none of this experiment's, or needs a GPU, and there is none.
    """
    on_gpu = settings.device.type == "cuda"
    possible = STEP_FORMS if on_gpu else tuple(form for form in STEP_FORMS if form not in COMPILED_STEP_FORMS)
    for form in settings.forms:
        if form not in possible:
            raise ConfigError("--forms", form, f"one of {', '.join(possible)} on a {settings.device.type}")
    return tuple(form for form in possible if form in (settings.forms or possible))


def options_of(form: str) -> dict[str, Any]:
    """What `graphs.accelerate` is given for a form."""
    if form not in ADDED:
        return {"compiler_options": {"hyper_connections": form == "recorded+mhc"}}
    names, wanted = list(ADDED), set[str]()
    for name in names[: names.index(form) + 1]:
        wanted.update(ADDED[name])
    return {"compiler": "inductor", "compiler_options": {name: name in wanted for name in REWRITES}}


def measure_deepseek_v4(settings: BenchSettings, progress: Progress) -> tuple[list[BenchRow], list[BarRow]]:
    """A row for each form, with its kernels by kind, and bars for the fastest recorded one.

    Raises:
        ConfigError: a form that the device cannot run.
        WrongResult: a token is not among those that eager finds likeliest.
    """
    device, workload = settings.device, workload_for(settings.device)
    model, ids = workload.model(device), workload.ids(device)
    torch.compiler.reset()
    with several_ways():
        rows = _measured([_made(name, model, workload, ids) for name in chosen_step_forms(settings)], ids, settings, progress)
    torch.compiler.reset()
    return rows, _bars(rows, device)


def _made(name: str, model: Any, workload: Workload, ids: torch.Tensor) -> Step:
    if name != "eager":
        model = graphs.accelerate(copy.deepcopy(model), **options_of(name))
    call = functools.partial(model.generate, ids, max_new_tokens=workload.new, min_new_tokens=workload.new, do_sample=False)
    report = None if name == "eager" else functools.partial(graphs.accelerated_report, model)
    return Step(Form(name, call, report), model, workload)


def _measured(steps: Sequence[Step], ids: torch.Tensor, settings: BenchSettings, progress: Progress) -> list[BenchRow]:
    workload, device, runs = steps[0].workload, settings.device, math.ceil(settings.runs / 2)
    eager = _made("eager", steps[0].model if steps[0].form.name == "eager" else workload.model(device), workload, ids)
    expected, first, equal = eager.form.call(), {}, {}
    with progress.case(f"first calls: {workload.describe()}", len(steps)) as tick:
        for step in steps:
            first[step.form.name] = wall_seconds(step.form.call, device)
            equal[step.form.name] = settle(step.form, eager.model, expected, workload.prompt)
            step.tokens(ids, 1)
            tick()
    calls = {(one.form.name, new): functools.partial(one.tokens, ids, new) for one in steps for new in (1, workload.new)}
    variants = {f"{name} {new}": Variant(call) for (name, new), call in calls.items()}
    with progress.case(f"steps: {workload.describe()}, {runs} runs", runs * len(variants)) as tick:
        times = wall_variants(variants, device, runs=runs, warm_up=0, tick=tick)
    rows = []
    for step in steps:  # the kernels last, since a profiler slows down what comes after it
        name = step.form.name
        pairs = zip(times[f"{name} {workload.new}"], times[f"{name} 1"], strict=True)
        seconds = [(long - short) / (workload.new - 1) for long, short in pairs]
        longer, shorter = (kernels_of(functools.partial(step.tokens, ids, new), device) for new in (3, 2))
        kernels = by_kind({kernel: longer[kernel] - shorter[kernel] for kernel in longer | shorter})
        rows.append(_row(step, seconds, first[name], equal[name], kernels))
    return rows


def _row(step: Step, seconds: list[float], first: float, equal: float, kernels: dict[str, int]) -> BenchRow:
    report = step.form.report() if step.form.report is not None else None
    return BenchRow(
        workload="deepseek_v4",
        case=step.workload.describe(),
        rows=step.workload.batch,
        mode=step.form.name,
        operations=step.model.config.num_hidden_layers,
        host_us=Spread.of(seconds, 1e6),
        device_us=None,
        tokens_per_second=Spread.of([step.workload.batch / one for one in seconds]),
        first_call_seconds=first,
        recordings=report.recordings if report is not None else 0,
        equal_tokens=equal,
        kernels=kernels,
    )


def _bars(rows: Sequence[BenchRow], device: torch.device) -> list[BarRow]:
    recorded = [row for row in rows if row.mode != "eager"]
    if device.type != "cuda" or not recorded:
        return []
    best = min(recorded, key=lambda row: row.host_us.median)
    where = describe_machine(device).device
    limit, goal = STEP_MS
    ms = Spread(best.host_us.median / 1e3, best.host_us.low / 1e3, best.host_us.high / 1e3, best.host_us.runs)
    per_layer = sum(best.kernels.values()) / best.operations
    return [
        BarRow(
            f"recorded step, {best.mode}, {best.case}", f"at most {limit:g} ms, goal {goal:g}", "ms", ms, limit, False,
            {best.mode: best.host_us}, where, goal=goal,
        ),
        BarRow(
            f"kernels per layer, {best.mode}, {best.case}", f"at most {KERNELS[0]}, goal {KERNELS[1]}", "kernels",
            Spread(per_layer, per_layer, per_layer, 1), float(KERNELS[0]), False, {best.mode: best.host_us}, where,
            goal=float(KERNELS[1]),
        ),
    ]  # fmt: skip
