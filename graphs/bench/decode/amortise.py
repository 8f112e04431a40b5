"""How launch overhead amortises: what a recording saves per step, and after how many calls it has paid for itself."""

from __future__ import annotations

from dataclasses import dataclass

from graphs.bench.harness.rows import BenchRow, Results
from graphs.bench.harness.table import pairs


@dataclass(frozen=True)
class Amortisation:
    """Decode steps of one model, eager and replayed, over batch sizes in ascending order. Times in microseconds per step.

    Attributes:
        batches: sequences in a step.
        host_us: eager, what the host needs to submit a step.
        device_us: eager, what the device needs for it; empty on a CPU, where the host does the work.
        eager_us, replay_us: a step when steps follow each other.
        capture_seconds: what the recording of each batch size cost.
        break_even: calls after which it is paid back; None where a replay is not faster.
    """

    batches: tuple[int, ...]
    host_us: tuple[float, ...]
    device_us: tuple[float, ...]
    eager_us: tuple[float, ...]
    replay_us: tuple[float, ...]
    capture_seconds: tuple[float, ...]
    break_even: tuple[int | None, ...]

    @classmethod
    def of(cls, results: Results) -> Amortisation | None:
        """Of the decode steps in ``results``; None where there are none."""
        found = sorted((pair for pair in pairs(results) if pair[0].workload == "decode"), key=lambda pair: pair[0].rows)
        if not found:
            return None
        eager, graph = zip(*found, strict=True)
        return cls(
            batches=tuple(row.rows for row in eager),
            host_us=tuple(row.host_us.median for row in eager),
            device_us=_device_times(eager),
            eager_us=tuple(row.call_us for row in eager),
            replay_us=tuple(row.call_us for row in graph),
            capture_seconds=tuple(row.capture_seconds for row in graph),
            break_even=tuple(row.break_even_calls for row in graph),
        )

    @property
    def on_device(self) -> bool:
        """Whether there is a device besides the host."""
        return bool(self.device_us)

    def sentence(self) -> str:
        """The answer in words and numbers: of the smallest batch, where launches weigh most, with the gain at the largest."""
        batch, eager, replay = self.batches[0], milliseconds(self.eager_us[0]), milliseconds(self.replay_us[0])
        gain = f"{self.eager_us[0] / self.replay_us[0]:.2f}x as fast"
        if len(self.batches) > 1:
            gain += f", {self.eager_us[-1] / self.replay_us[-1]:.2f}x at batch {self.batches[-1]}"
        if self.on_device:
            host, device = milliseconds(self.host_us[0]), milliseconds(self.device_us[0])
            step = f"the host needs {host} to submit a decode step that takes the device {device}; replayed, it takes {replay}"
        else:
            step = f"a decode step takes {eager} eager and {replay} from the operator tape"
        calls = self.break_even[0]
        cost = f"the {self.capture_seconds[0]:.2g} s of recording are"
        paid = f"{cost} paid back after {calls:,} calls" if calls is not None else f"{cost} never paid back"
        return f"At batch {batch} {step} ({gain}), and {paid}."


def milliseconds(us: float) -> str:
    """Microseconds as text in ms, with three digits."""
    return f"{us / 1e3:,.3g} ms" if us < 1e6 else f"{us / 1e3:,.0f} ms"


def _device_times(rows: tuple[BenchRow, ...]) -> tuple[float, ...]:
    times = [row.device_us.median for row in rows if row.device_us is not None]
    return tuple(times) if len(times) == len(rows) else ()
