"""Tokens per second of ``model.generate()`` in each form; what comes out is checked before anything is timed."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import graphs
from graphs.bench.choices import COMPILED_FORMS, FORMS, MODELS
from graphs.bench.compile.inductor import several_ways
from graphs.bench.generate.models import Model, Workload, workloads
from graphs.bench.harness.machine import describe_machine
from graphs.bench.harness.progress import Progress
from graphs.bench.harness.rows import BarRow, BenchRow, WrongResult
from graphs.bench.harness.sampling import Spread, Variant, ratios, wall_seconds, wall_variants
from graphs.bench.settings import BenchSettings
from graphs.errors import ConfigError

Tensor = torch.Tensor
SETTLED = 4  # calls until everything is compiled and recorded: a prompt is at its third
STATIC = {"cache_implementation": "static"}
ARGUMENTS: dict[str, dict[str, Any]] = {"static": {**STATIC, "disable_compile": True}, "auto-compile": STATIC}
OPTIONS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "inductor": {"compiler": "inductor"},
    "inductor+around": {"compiler": "inductor", "compiler_options": {"norm_prologues": True, "product_epilogues": True}},
}
"""What `graphs.accelerate` is given, of the forms on recordings."""
BARS = {"GPT-2": (("graphs", "inductor"), 2.5, 5.0), "Llama": (("inductor",), 2.2, 2.8)}
"""Of each model on a GPU: the forms, and how many times the tokens per second of ``auto-compile`` they have to reach."""


TOLERANCE = 0.25
"""Standard deviations of the scores of one position by which a token may be behind the likeliest one.

In bfloat16 scores are told apart by 0.03 of them; a token that was not chosen by its score is 3 or more behind, most often.
"""


@dataclass(frozen=True)
class Form:
    """One way to generate.

    Attributes:
        call: gives token ids ``[batch, prompt + new]``.
        report: of its recordings; None where it has none.
    """

    name: str
    call: Callable[[], Tensor]
    report: Callable[[], graphs.CaptureReport] | None = None


def measure_generate(settings: BenchSettings, progress: Progress) -> tuple[list[BenchRow], list[BarRow]]:
    """Rows for each model and form, and bars where both of their sides were measured.

    A repetition is a whole ``generate()`` of dozens of steps, so half as many are made as of the other experiments.

    Raises:
        ConfigError: a form that compiles was asked for on a CPU.
        WrongResult: a token is not among those that eager finds likeliest, or is another than eager's in float32.
    """
    rows, bars = [], []
    for workload in chosen_workloads(settings):
        torch.compiler.reset()
        with several_ways():
            found, times = _measure(workload, chosen_forms(settings), settings, progress)
        rows += found
        bars += _bars(workload, times, settings)
    torch.compiler.reset()
    return rows, bars


def chosen_workloads(settings: BenchSettings) -> list[Workload]:
    """The models of a run: those that were asked for, else the first with ``settings.quick``, else all."""
    return workloads(settings.device, settings.models or (MODELS[:1] if settings.quick else MODELS))


def chosen_forms(settings: BenchSettings) -> tuple[str, ...]:
    """The forms of a run: those that were asked for, else all that the device can run.

    Raises:
        ConfigError: one of them needs a GPU, and there is none.
    """
    possible = FORMS if settings.device.type == "cuda" else tuple(form for form in FORMS if form not in COMPILED_FORMS)
    for form in settings.forms:
        if form not in possible:
            raise ConfigError("--forms", form, f"one of {', '.join(possible)} on a {settings.device.type}")
    return tuple(form for form in possible if form in (settings.forms or possible))


def make_form(name: str, model: Model, ids: Tensor, new: int) -> Form:
    """One way to generate, with a model of its own where it changes the model."""
    if name not in ("dynamic", "static"):
        model = copy.deepcopy(model)
    call = functools.partial(model.generate, ids, max_new_tokens=new, do_sample=False, **ARGUMENTS.get(name, {}))
    if name not in OPTIONS:
        return Form(name, call)
    graphs.accelerate(model, **OPTIONS[name])
    call = functools.partial(model.generate, ids, max_new_tokens=new, do_sample=False)
    return Form(name, call, functools.partial(graphs.accelerated_report, model))


def _measure(
    workload: Workload, names: Sequence[str], settings: BenchSettings, progress: Progress
) -> tuple[list[BenchRow], dict[str, list[float]]]:
    device, runs = settings.device, math.ceil(settings.runs / 2)
    model, ids = workload.model(device), workload.ids(device)
    expected = make_form("dynamic", model, ids, workload.new).call()
    forms = [make_form(name, model, ids, workload.new) for name in names]
    first, equal = {}, {}
    with progress.case(f"first calls: {workload.describe()}", len(forms)) as tick:
        for form in forms:
            first[form.name] = wall_seconds(form.call, device)
            equal[form.name] = settle(form, model, expected, workload.prompt)
            tick()
    variants = {form.name: Variant(form.call) for form in forms}
    with progress.case(f"generate: {workload.describe()}, {runs} runs", runs * len(forms)) as tick:
        times = wall_variants(variants, device, runs=runs, warm_up=0, tick=tick)
    rows = [_row(workload, form, times[form.name], first[form.name], equal[form.name]) for form in forms]
    return rows, times


def settle(form: Form, model: Model, expected: Tensor, prompt: int) -> float:
    """Call until everything is compiled and recorded, and check the tokens; returns the share of them that are eager's.

    Rounding in other places tells two tokens apart that eager finds nearly alike, and all that follows is another text. So each
    token is held against what eager finds likeliest after the tokens before it; only in float32 it has to be eager's own.

    Raises:
        WrongResult: it is not, or later calls record anew.
    """
    known = []
    for _ in range(SETTLED):
        tokens = form.call()
        known.append(form.report().recordings if form.report is not None else 0)
    if tokens.shape != expected.shape:
        raise WrongResult(f"{form.name}: tokens of shape {tuple(tokens.shape)}, not {tuple(expected.shape)}")
    behind = _behind_the_likeliest(model, tokens, prompt)
    share = (tokens == expected)[:, prompt:].double().mean().item()
    if behind > TOLERANCE or (model.dtype == torch.float32 and share < 1):
        raise WrongResult(f"{form.name}: {share:.0%} of the tokens are eager's, and one is {behind:.3g} deviations behind")
    if known[-1] != known[-2] or (form.report is not None and not known[-1]):
        raise WrongResult(f"{form.name}: {known} recordings after each of {SETTLED} calls")
    return share


def _behind_the_likeliest(model: Model, tokens: Tensor, prompt: int) -> float:
    """How far the token is behind, at worst."""
    with torch.no_grad():
        scores = model(tokens[:, :-1]).logits[:, prompt - 1 :].float()
    chosen = scores.gather(-1, tokens[:, prompt:, None])[..., 0]
    return float(((scores.amax(-1) - chosen) / scores.std(-1)).max())


def _row(workload: Workload, form: Form, seconds: list[float], first: float, equal: float) -> BenchRow:
    report = form.report() if form.report is not None else None
    return BenchRow(
        workload="generate",
        case=workload.describe(),
        rows=workload.batch,
        mode=form.name,
        operations=workload.new,
        host_us=Spread.of(seconds, 1e6 / workload.new),
        device_us=None,
        tokens_per_second=Spread.of([workload.batch * workload.new / one for one in seconds]),
        first_call_seconds=first,
        recordings=report.recordings if report is not None else 0,
        equal_tokens=equal,
    )


def _bars(workload: Workload, times: dict[str, list[float]], settings: BenchSettings) -> list[BarRow]:
    forms, limit, goal = BARS.get(workload.name, ((), 0.0, 0.0))
    if "auto-compile" not in times:
        return []
    return [
        BarRow(
            name=f"{ours} over auto-compile, tokens per second, {workload.describe()}",
            bar=f"at least {limit:g}x, goal {goal:g}x",
            unit="x",
            measured=Spread.of(ratios(times["auto-compile"], times[ours])),
            limit=limit,
            at_least=True,
            sides={name: Spread.of(times[name], 1e6 / workload.new) for name in (ours, "auto-compile")},
            device=describe_machine(settings.device).device,
            goal=goal,
        )
        for ours in forms
        if ours in times
    ]
