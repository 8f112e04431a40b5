"""``generate()`` of GPT-2 and a Llama in each form. Tokens are checked, and everything is compiled, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphs.bench.choices import FORMS, MODELS
from graphs.bench.generate.measure import chosen_forms, make_form, settle
from graphs.bench.generate.models import Model, Workload, workloads
from graphs.bench.settings import BenchSettings

Timer = Callable[..., None]


@pytest.fixture(scope="module", params=MODELS)
def generation(request: pytest.FixtureRequest, device: torch.device) -> tuple[Workload, Model]:
    """What is asked for, and the model: one for all forms."""
    (workload,) = workloads(device, (request.param,))
    return workload, workload.model(device)


@pytest.mark.parametrize("form", FORMS)
def test_generate(benchmark: Any, time_call: Timer, generation: tuple[Workload, Model], device: torch.device, form: str) -> None:
    workload, model = generation
    if form not in chosen_forms(BenchSettings(device)):
        pytest.skip(f"{form} is measured on a GPU")
    ids = workload.ids(device)
    expected = make_form("dynamic", model, ids, workload.new).call()
    made = make_form(form, model, ids, workload.new)
    benchmark.group = workload.describe()
    benchmark.extra_info["equal tokens"] = settle(made, model, expected, workload.prompt)
    time_call(made.call, device)
