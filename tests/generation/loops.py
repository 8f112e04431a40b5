"""What was recorded of the loops of an accelerated model."""

from __future__ import annotations

from typing import Any

import graphs


def loops_of(model: Any) -> list[Any]:
    return [step for step in model._graphs_accelerated.loop.steps() if step.report().replays]


def host_reasons(model: Any) -> list[str]:
    details = [refusal.detail for refusal in graphs.accelerated_report(model).refusals]
    return [detail.partition("needed for: ")[2] for detail in details if "needed for" in detail]
