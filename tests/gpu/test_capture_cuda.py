"""Captured steps on a GPU: equal to eager, state advanced once per call, failures named and survived."""

import gc
import threading
import warnings

import pytest
import torch

import graphs
from graphs.errors import CaptureFailed, HostSync, MixedDevices, MovedStaticTensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language", reason="Triton is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")


class Block(torch.nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Counter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ring", torch.zeros(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ring.index_copy_(0, (self.count % 16).view(1), x[:1])
        self.count.add_(1)
        return x * self.count + self.ring.sum()


@pytest.fixture
def block(device: torch.device) -> Block:
    torch.manual_seed(0)
    return Block().to(device).eval()


def test_replays_equal_eager_with_new_data_and_new_addresses(block, device):
    step = graphs.capture(block)
    kept = []
    with torch.no_grad():
        for _ in range(20):
            x = torch.randn(4, 64, device=device)
            out = step(x)
            kept.append((x, out))
        for x, out in kept:  # owned: no output was overwritten by a later call
            torch.testing.assert_close(out, block(x))
    report = step.report()
    assert (report.recordings, report.replays, report.eager_calls, report.refusals) == (1, 20, 0, ())
    assert report.keys[0].replay_device_us > 0


def test_host_far_ahead_of_the_device_wraps_the_address_table(device):
    step = graphs.capture(lambda x: x * 2 + 1)
    inputs = [torch.full((8,), float(i), device=device) for i in range(1500)]
    step(inputs[0])
    torch.cuda._sleep(400_000_000)
    outputs = [step(x) for x in inputs]
    for i, out in enumerate(outputs):
        assert torch.equal(out, torch.full((8,), 2.0 * i + 1, device=device)), i


def test_state_advances_once_per_call_including_the_first(device):
    model, reference = Counter().to(device), Counter().to(device)
    step = graphs.capture(model)
    for i in range(40):
        x = torch.randn(4, 8, device=device)
        torch.testing.assert_close(step(x), reference(x))
        assert int(model.count) == i + 1
    torch.testing.assert_close(model.ring, reference.ring)
    assert step.report().replays == 40


@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned", "expanded"])
def test_inputs_of_any_layout(device, layout):
    step = graphs.capture(lambda x: x.float().cumsum(0))
    for _ in range(3):
        base = torch.randn(33, 17, device=device, dtype=torch.float16)
        x = {
            "transposed": base.t(),
            "sliced": base[3:20, 2:9],
            "misaligned": base.view(-1)[1:200],
            "expanded": base[:1].expand(5, 17),
        }[layout]
        torch.testing.assert_close(step(x), x.float().cumsum(0))
    assert step.report().replays == 3


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.complex64]
)
def test_inputs_of_any_dtype_and_odd_sizes(device, dtype):
    step = graphs.capture(lambda x, y: (x.clone(), y.t().clone(), x[:1]))
    for shape in [(1,), (7, 3), (5, 1031)]:
        for _ in range(3):
            x = (torch.randn(shape, device=device) * 3).to(dtype)
            y = torch.randint(0, 9, (2, 3), device=device)
            a, b, c = step(x, y)
            assert torch.equal(a, x) and torch.equal(b, y.t()) and torch.equal(c, x[:1])


def test_outputs_keep_structure_and_dense_strides(device):
    def model(x):
        return {"t": x.t() + 1, "pair": (x.sum(), [x * 2, None, 3])}

    step = graphs.capture(model)
    x = torch.randn(3, 5, device=device)
    step(x)
    out, expected = step(x), model(x)
    assert torch.equal(out["t"], expected["t"]) and out["t"].stride() == expected["t"].stride()
    assert torch.equal(out["pair"][0], expected["pair"][0]) and out["pair"][1][1:] == [None, 3]


def test_rng_is_fresh_each_replay_and_follows_the_seed(device):
    def model(x):
        return torch.nn.functional.dropout(x, 0.5, training=True) + torch.rand_like(x)

    step = graphs.capture(model)
    x = torch.ones(257, device=device)
    step(x)
    torch.manual_seed(7)
    expected = [model(x) for _ in range(3)]
    torch.manual_seed(7)
    replayed = [step(x) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(expected, replayed, strict=True))
    assert not torch.equal(replayed[0], replayed[1])


@pytest.mark.parametrize("padding", ["repeat", "zero"])
def test_buckets_pad_and_cut(block, device, padding):
    step = graphs.capture(block, buckets=(4, 8), batch_dims={"x": 0}, padding={"x": padding})
    with torch.no_grad():
        for rows in (3, 1, 4, 5, 8, 2, 7):
            x = torch.randn(rows, 64, device=device)
            torch.testing.assert_close(step(x), block(x))
    report = step.report()
    assert {key.rows for key in report.keys} == {4, 8} and not report.refusals
    assert step(torch.randn(9, 64, device=device)).shape == (9, 64)
    assert [r.reason for r in step.report().refusals] == ["above-largest-bucket"]


def test_padding_in_a_middle_dimension(device):
    step = graphs.capture(lambda x: x.float() * 2, buckets=(4,), batch_dims={"x": 1})
    for rows in (3, 1, 4):
        x = torch.randn(3, rows, 5, device=device, dtype=torch.bfloat16)
        assert torch.equal(step(x), x.float() * 2)
    assert step.report().keys[0].rows == 4


@pytest.mark.parametrize("limit", [1 << 10, 1 << 26], ids=["ahead of the graph", "inside the graph"])
@pytest.mark.parametrize("dim", [0, 1])
def test_large_inputs_are_copied(device, dim, limit, monkeypatch):
    monkeypatch.setattr("graphs.recording.cuda_graph.LARGE", limit)
    step = graphs.capture(lambda x, y: (x.float().sum(-1), y * 2), buckets=(8,), batch_dims={"x": dim, "y": 0})
    for rows in (5, 8, 1):
        shape = (rows, 3, 40000) if dim == 0 else (3, rows, 40000)
        x = torch.randn(shape, device=device, dtype=torch.float16).transpose(0, 1).contiguous().transpose(0, 1)
        y = torch.randn(rows, 4, device=device)
        a, b = step(x, y)
        torch.testing.assert_close(a, x.float().sum(-1))
        assert torch.equal(b, y * 2)
    assert step.report().keys[0].rows == 8


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_any_number_of_small_inputs(device, count):
    """Few of them read their addresses from host memory themselves, for more one kernel fetches them."""
    step = graphs.capture(lambda *inputs: [x * 2 for x in inputs])
    for turn in range(600):  # more than the ring of addresses holds
        inputs = [torch.full((17,), 10.0 * turn + index, device=device) for index in range(count)]
        outputs = step(*inputs)
        if turn % 50 == 0:
            assert all(torch.equal(out, x * 2) for out, x in zip(outputs, inputs, strict=True)), turn


def test_interacting_rows_are_recorded_at_exact_sizes(device):
    def model(x):
        return x - x.mean(0, keepdim=True)

    step = graphs.capture(model, buckets=(4, 8), batch_dims={"x": 0})
    for rows in (3, 5, 3):
        x = torch.randn(rows, 6, device=device)
        torch.testing.assert_close(step(x), model(x))
    report = step.report()
    assert [key.rows for key in report.keys] == [None, None]
    assert {r.reason for r in report.refusals} == {"rows-interact"}


def test_sentinel_rows_may_be_written(device):
    cache = torch.zeros(9, 4, device=device)

    def model(x, slots):
        cache.index_copy_(0, slots, x)
        return cache.index_select(0, slots) * 2

    step = graphs.capture(model, buckets=(4,), batch_dims={"x": 0, "slots": 0}, padding={"slots": graphs.sentinel(8)})
    for slots in ([0, 1, 2], [5], [3, 7]):
        x = torch.randn(len(slots), 4, device=device)
        index = torch.tensor(slots, device=device)
        assert torch.equal(step(x, index), x * 2)
        assert torch.equal(cache[index], x)
    assert [key.rows for key in step.report().keys] == [4]


def test_host_sync_is_refused_by_line(device):
    def model(x):
        return x * x.sum().item()

    step = graphs.capture(model, passes="off")
    x = torch.randn(4, device=device)
    torch.testing.assert_close(step(x), model(x))
    refusal = step.report().refusals[0]
    assert refusal.reason == "host-sync" and refusal.file == __file__ and refusal.line > 0
    with pytest.raises(HostSync):
        graphs.capture(model, strict=True, passes="off")(x)


def test_host_constant_and_mixed_devices_are_refused(device):
    step = graphs.capture(lambda x: x + torch.tensor([1.0, 2.0], device=device), passes="off")
    step(torch.ones(2, device=device))
    assert step.report().refusals[0].reason == "host-constant"
    with pytest.raises(MixedDevices):
        graphs.capture(lambda x, y: x + y.to(x.device), strict=True)(torch.ones(1 << 16, device=device), torch.ones(1 << 16))


@torch.library.custom_op("graphs_test::synchronising", mutates_args=())
def synchronising(x: torch.Tensor) -> torch.Tensor:
    torch.cuda.synchronize()
    return x + 1


@synchronising.register_fake
def _(x):
    return torch.empty_like(x)


def test_error_inside_capture_is_named_and_survived(block, device):
    def model(x):
        y = x * 2
        return synchronising(y)

    x = torch.randn(4, 64, device=device)
    step = graphs.capture(model)
    torch.testing.assert_close(step(x), x * 2 + 1)
    refusal = step.report().refusals[0]
    assert refusal.reason == "capture-failed" and "synchronising" in refusal.operator and refusal.file == __file__
    with pytest.raises(CaptureFailed):
        graphs.capture(model, strict=True)(x)
    assert not torch.cuda.is_current_stream_capturing()
    with torch.no_grad():
        after = graphs.capture(block)
        for _ in range(3):
            torch.testing.assert_close(after(x), block(x))
    assert after.report().replays == 3
    torch.cuda.synchronize()


def test_failed_and_dropped_captures_leak_nothing(device):
    def build_and_drop() -> None:
        step = graphs.capture(lambda x: synchronising(torch.empty(1 << 24, device=device).fill_(1.0)[: x.numel()] + x))
        step(torch.ones(4, device=device))
        good = graphs.capture(lambda x: (torch.empty(1 << 24, device=device).fill_(1.0) * 2)[: x.numel()] + x)
        good(torch.ones(4, device=device))
        good(torch.ones(4, device=device))

    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    build_and_drop()
    before = reserved()
    for _ in range(3):
        build_and_drop()
    assert reserved() <= before


def test_replaced_weights_and_moved_arguments_are_used_by_the_same_recording(block, device):
    x = torch.randn(4, 64, device=device)
    with torch.no_grad():
        for change in ("data", "assign", "to"):
            model = Block().to(device)
            step = graphs.capture(model)
            step(x)
            if change == "data":
                model.up.weight.data = torch.randn_like(model.up.weight)
            elif change == "assign":
                model.up.weight = torch.nn.Parameter(torch.randn_like(model.up.weight))
            else:
                kept = [weight.detach() for weight in model.parameters()]  # or the weights may come back to where they were
                model.to("cpu").to(device)
                del kept
            torch.testing.assert_close(step(x), model(x))
            report = step.report()
            assert (report.recordings, report.moved, report.refusals) == (1, 1, ()), change
            step.invalidate()
            torch.testing.assert_close(step(x), model(x))
            assert step.report().recordings == 1
    strict = graphs.capture(lambda kv, x: kv.add_(x), strict=True, static=["kv"])
    kv = torch.zeros(4, device=device)
    strict(kv, torch.ones(4, device=device))
    other = torch.zeros(4, device=device)
    strict(other, torch.ones(4, device=device))
    assert other.tolist() == kv.tolist() == [1] * 4
    with pytest.raises(MovedStaticTensor):
        strict(torch.zeros(8, device=device)[4:], torch.ones(4, device=device))


def test_in_place_weight_updates_are_seen(block, device):
    step = graphs.capture(block)
    x = torch.randn(4, 64, device=device)
    with torch.no_grad():
        step(x)
        block.up.weight.mul_(2)
        torch.testing.assert_close(step(x), block(x))


def test_other_streams_and_threads(block, device):
    steps = [graphs.capture(block, buckets=(8,), batch_dims={"x": 0}), graphs.capture(block)]
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator(device).manual_seed(seed)
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(device)):
                for i in range(50):
                    x = torch.randn(1 + (seed + i) % 8, 64, device=device, generator=generator)
                    torch.testing.assert_close(steps[i % 2](x), block(x))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


def test_compiled_model_inside(block, device):
    compiled = torch.compile(block)
    step = graphs.capture(compiled)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(4, 64, device=device)
            torch.testing.assert_close(step(x), block(x), rtol=1e-3, atol=1e-4)
    assert step.report().replays == 4 and not step.report().refusals


def test_borrowed_outputs_share_storage(block, device):
    step = graphs.capture(block, outputs="borrowed")
    with torch.no_grad():
        a = step(torch.randn(4, 64, device=device))
        x = torch.randn(4, 64, device=device)
        b = step(x)
        assert a.data_ptr() == b.data_ptr()
        torch.testing.assert_close(b, block(x))


def test_step_inside_somebody_elses_capture_runs_eagerly(block, device):
    step = graphs.capture(block)
    x = torch.randn(4, 64, device=device)
    with torch.no_grad():
        for _ in range(2):
            step(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(out, block(x))
        torch.testing.assert_close(step(x), block(x))
    assert [r.reason for r in step.report().refusals] == ["nested-capture"]


@triton.jit
def _double(x, out, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index, mask=index < n) * 2, mask=index < n)


def test_raw_triton_launch_is_refused_as_opaque(device):
    def model(x):
        out = torch.empty_like(x)
        _double[(1,)](x, out, x.numel(), BLOCK=64)
        return out

    step = graphs.capture(model)
    x = torch.randn(64, device=device)
    torch.testing.assert_close(step(x), x * 2)
    refusal = step.report().refusals[0]
    assert (refusal.reason, refusal.operator, refusal.file) == ("opaque-kernel", "_double", __file__)


def test_llama_decode_equals_eager(device):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, vocab_size=512
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to(device, torch.bfloat16)
    step = graphs.capture(model)

    def decode(callee, tokens=40):
        cache = transformers.StaticCache(config, max_cache_len=64)
        prompt = torch.arange(16, device=device).view(2, 8)
        positions = torch.arange(8, device=device).expand(2, 8)
        token = model(prompt, past_key_values=cache, position_ids=positions).logits[:, -1:].argmax(-1)
        generated = []
        for i in range(tokens):
            out = callee(token, past_key_values=cache, position_ids=torch.full((2, 1), 8 + i, device=device))
            assert out.past_key_values is cache
            token = out.logits[:, -1:].argmax(-1)
            generated.append(token)
        return torch.cat(generated, 1)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", graphs.dispatch.call_log.NotReplayed)
        assert torch.equal(decode(model), decode(step))
        assert torch.equal(decode(model, 20), decode(step, 20))  # another cache: another key
    assert step.report().replays == 60


def test_cleared_library_workspaces_do_not_pull_memory_from_under_a_graph(device):
    """``torch.compile(mode="reduce-overhead")`` clears them; a recorded split-K GEMM still writes to its own."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(8192, 64, bias=False), torch.nn.Linear(64, 8192, bias=False)] * 4)
    model = model.to(device, torch.bfloat16)
    step = graphs.capture(model)
    with torch.no_grad():
        x = torch.randn(4, 8192, device=device, dtype=torch.bfloat16)
        expected = model(x)
        torch.testing.assert_close(step(x), expected)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        bystanders = [torch.ones(1 << 20, device=device) for _ in range(64)]  # whatever takes the freed memory
        for _ in range(5):
            torch.testing.assert_close(step(x), expected)
        assert all(bool((bystander == 1).all()) for bystander in bystanders)
