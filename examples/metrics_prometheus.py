"""What a captured step does, as metrics that Prometheus scrapes: replays and recordings, and refusals by their reason.

    pip install "stepgraphs[metrics]"
    python examples/metrics_prometheus.py

`graphs.on_event` calls back for each event. A server would call ``prometheus_client.start_http_server(8000)`` once; here the
page that Prometheus would read is printed.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

import graphs
from graphs.events import Recorded, Refused, Replayed


class Metrics:
    """Prometheus metrics of all captured steps of this process; an instance is the callback of `graphs.on_event`."""

    def __init__(self, registry: Any) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        step = ("step", "size")
        self.replays = Counter("graphs_replays", "Calls served by a recording.", step, registry=registry)
        self.replay_seconds = Histogram(
            "graphs_replay_host_seconds",
            "Time on the host of one replay.",
            step,
            registry=registry,
            buckets=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2, 1e-1, 1.0),
        )
        self.recordings = Counter("graphs_recordings", "Recordings made.", step, registry=registry)
        self.recording_seconds = Counter("graphs_recording_seconds", "Time spent on recording.", step, registry=registry)
        self.bytes = Gauge("graphs_recording_bytes", "Memory of recordings.", step, registry=registry)
        self.refusals = Counter("graphs_refusals", "Calls not replayed.", ("step", "reason"), registry=registry)

    def __call__(self, event: graphs.Event) -> None:
        """Count one event."""
        if isinstance(event, Replayed):
            self.replays.labels(event.step, event.size).inc()
            self.replay_seconds.labels(event.step, event.size).observe(event.seconds)
        elif isinstance(event, Recorded):
            self.recordings.labels(event.step, event.size).inc()
            self.recording_seconds.labels(event.step, event.size).inc(event.seconds)
            self.bytes.labels(event.step, event.size).inc(event.bytes)
        elif isinstance(event, Refused):
            self.refusals.labels(event.step, event.reason).inc()


def reads_a_value(x: Tensor) -> Tensor:
    """A step that is refused: it takes a number to the host by way of NumPy, where nothing can follow it."""
    return x * float(x.cpu().numpy().sum())


def main() -> None:
    """Run a step that is replayed and one that is refused, and print the page of metrics."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as error:
        raise SystemExit('this example needs: pip install "stepgraphs[metrics]"') from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    registry = CollectorRegistry()
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval().to(device)
    step = graphs.capture(model, buckets=(4, 8), batch_dims={"input": 0}, name="feed-forward")
    refused = graphs.capture(reads_a_value)
    with torch.no_grad(), graphs.on_event(Metrics(registry)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the refusal, which is counted
        for batch in (3, 4, 7, 8, 3, 4):
            x = torch.randn(batch, 64, device=device)
            torch.testing.assert_close(step(x), model(x))
            torch.testing.assert_close(refused(x), reads_a_value(x))
    print(f"12 calls on {device}, the same eager and captured")
    page = generate_latest(registry).decode()
    print("\n".join(line for line in page.splitlines() if "_total" in line and not line.startswith("#")))


if __name__ == "__main__":
    main()
