"""What a captured step does, as OpenTelemetry metrics and spans: replays, refusals by their reason, and a span per recording.

    pip install "stepgraphs[metrics]"
    python examples/metrics_opentelemetry.py

A service has its exporters set up already, and needs `Telemetry` alone. Here metrics and spans are kept in memory and printed.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

import graphs
from graphs.events import Recorded, Refused, Replayed


class Telemetry:
    """Instruments for all captured steps of this process; an instance is the callback of `graphs.on_event`."""

    def __init__(self, meter: Any, tracer: Any) -> None:
        self.tracer = tracer
        self.replays = meter.create_counter("graphs.replays", description="calls served by a recording")
        self.seconds = meter.create_histogram("graphs.replay.host", unit="s", description="time on the host of one replay")
        self.bytes = meter.create_up_down_counter("graphs.recordings.memory", unit="By", description="memory of recordings")
        self.refusals = meter.create_counter("graphs.refusals", description="calls not replayed, by reason")

    def __call__(self, event: graphs.Event) -> None:
        """Count one event; a recording becomes a span, below the span of the request that it delays."""
        labels = {"step": event.step, "size": event.size}
        if isinstance(event, Replayed):
            self.replays.add(1, labels)
            self.seconds.record(event.seconds, labels)
        elif isinstance(event, Recorded):
            self.bytes.add(event.bytes, labels)
            end = int(event.time * 1e9)
            span = self.tracer.start_span("graphs.record", start_time=end - int(event.seconds * 1e9), attributes=labels)
            span.end(end)
        elif isinstance(event, Refused):
            self.refusals.add(1, {"step": event.step, "reason": event.reason})


def reads_a_value(x: Tensor) -> Tensor:
    """A step that is refused: it takes a number to the host by way of NumPy, where nothing can follow it."""
    return x * float(x.cpu().numpy().sum())


def main() -> None:
    """Run a step that is replayed and one that is refused, and print the metrics and spans."""
    try:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    except ImportError as error:
        raise SystemExit('this example needs: pip install "stepgraphs[metrics]"') from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    reader, spans, tracing = InMemoryMetricReader(), InMemorySpanExporter(), TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(spans))
    telemetry = Telemetry(MeterProvider([reader]).get_meter("example"), tracing.get_tracer("example"))
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval().to(device)
    step = graphs.capture(model, name="feed-forward")
    refused = graphs.capture(reads_a_value)
    with torch.no_grad(), graphs.on_event(telemetry), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the refusal, which is counted
        for _ in range(6):
            x = torch.randn(4, 64, device=device)
            torch.testing.assert_close(step(x), model(x))
            torch.testing.assert_close(refused(x), reads_a_value(x))
    print(f"12 calls on {device}, the same eager and captured")
    for span in spans.get_finished_spans():
        print(f"span {span.name} {span.attributes['size']}, {(span.end_time - span.start_time) / 1e9:.2f} s")
    for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            print(metric.name, dict(point.attributes), getattr(point, "value", None) or f"{point.count} values")


if __name__ == "__main__":
    main()
