from __future__ import annotations

import pytest
import torch

import graphs
from graphs.bench.decode import measure as decode
from graphs.bench.decode.llama import Decoding, LlamaSize, build_llama, prompts
from graphs.bench.decode.measure import batch_sizes, compare_tokens, measure_decode
from graphs.bench.harness.progress import Progress
from graphs.bench.harness.rows import WrongResult
from graphs.bench.settings import BenchSettings

CPU = torch.device("cpu")


def test_prompts_are_bytes_of_text_and_differ_between_rows() -> None:
    ids = prompts(3, 8, CPU)
    assert ids.shape == (3, 8)
    assert bytes(ids[0].tolist()).decode() == "The ferr"
    assert len({tuple(row) for row in ids.tolist()}) == 3


def test_reset_makes_a_step_repeatable(tiny: LlamaSize) -> None:
    model = build_llama(tiny, CPU)
    decoding = Decoding(model, tiny, 2, CPU)
    first = decoding.first_step(model)
    second = decoding.first_step(model)
    decoding.reset()
    assert torch.equal(decoding.first_step(model), first)
    assert not torch.equal(first, second)
    assert decoding.room == tiny.cache_len - tiny.prompt


def test_tokens_are_compared_and_replayed(tiny: LlamaSize) -> None:
    model = build_llama(tiny, CPU)
    step = graphs.capture(model)
    compare_tokens(Decoding(model, tiny, 2, CPU), step, 4)
    assert step.report().replays == 4


def test_a_step_that_is_not_replayed_is_an_error(tiny: LlamaSize) -> None:
    model = build_llama(tiny, CPU)

    def syncing(ids: torch.Tensor, past_key_values: object, position_ids: torch.Tensor) -> object:
        assert int(ids.max()) >= 0
        return model(ids, past_key_values=past_key_values, position_ids=position_ids)

    with pytest.warns(UserWarning, match="host-sync"), pytest.raises(WrongResult, match="0 of 4 decode steps were replayed"):
        compare_tokens(Decoding(model, tiny, 2, CPU), graphs.capture(syncing, passes="off"), 4)


def test_other_tokens_are_an_error(tiny: LlamaSize) -> None:
    model = build_llama(tiny, CPU)

    class Broken:
        """Says that it replays, and computes something else in graph mode."""

        mode = "eager"
        calls = 0

        def __call__(self, ids: torch.Tensor, **kwargs: object) -> object:
            self.calls += 1
            out = model(ids, **kwargs)
            if self.mode == "graph":
                out.logits = -out.logits
            return out

        def report(self) -> object:
            return type("Report", (), {"replays": self.calls})

    with pytest.raises(WrongResult, match=r"token 0 of sequence 0 is \d+ eager and \d+ replayed"):
        compare_tokens(Decoding(model, tiny, 2, CPU), Broken(), 4)


def test_rows_of_both_modes(
    tiny: LlamaSize, settings: BenchSettings, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "size_for", lambda device: tiny)
    cases = measure_decode(settings, progress)
    assert [case.rows[0].rows for case in cases] == list(batch_sizes(settings)) == [1, 4]
    for case in cases:
        eager, graph = case.rows
        assert (eager.mode, graph.mode) == ("eager", "graph")
        assert eager.case == graph.case == "tiny Llama"
        assert eager.host_us.runs == graph.tokens_per_second.runs == settings.runs
        assert eager.device_us is None and eager.capture_seconds == 0 and eager.break_even_calls is None
        assert graph.capture_seconds > 0
        assert set(case.calls) == {"eager", "graph"}
