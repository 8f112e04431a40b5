"""What a step reads besides the data of its arguments, and what it does besides returning: once wrong without a word."""

from __future__ import annotations

import array
import contextvars
import enum
import functools
import os
import random
import tempfile
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from graphs.dynamo.backend import graphs_backend
from tests.hazards.case import INFERENCE, NO_GRAD, Run, hazard, noise, steps

Tensor = torch.Tensor


def _complex(i: int) -> tuple[Tensor, ...]:
    return (torch.view_as_complex(noise(i, 3, 3, 2)),)


def conjugated(z: Tensor) -> Tensor:
    return z.conj()


def imaginary_of_conjugated(z: Tensor) -> Tensor:
    return z.conj().imag


def adjoint(z: Tensor) -> Tensor:
    return z.mH


def conjugated_and_more(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.conj() * 2, z.conj()[0]


def negated_view(z: Tensor) -> Tensor:
    return torch._neg_view(z.real)


steps(
    "C",
    *(conjugated, imaginary_of_conjugated, adjoint, conjugated_and_more, negated_view),
    arguments=_complex,
)


@hazard("C")
def arguments_with_bits(device: torch.device) -> Run:
    ways: tuple[Callable[[Tensor], Tensor], ...] = (lambda z: z, torch.conj, torch.conj_physical)
    return Run(lambda z: z.real * 2 + z.imag, lambda i: (ways[i % 3](_complex(i)[0].to(device)),))


@hazard("C")
def parts_with_bits(device: torch.device) -> Run:
    ways: tuple[Callable[[Tensor], Tensor], ...] = (lambda z: z.imag, lambda z: z.conj().imag)
    return Run(lambda v: v * 2, lambda i: (ways[i % 2](_complex(i)[0].to(device)),))


@hazard("C", contexts=(NO_GRAD,), calls=4)
def conjugated_by_the_backend(device: torch.device) -> Run:
    def wrap(step: Any) -> Any:
        torch._dynamo.reset()
        return step if step.__class__ is not types.FunctionType else torch.compile(step, backend=graphs_backend)

    return Run(lambda z: z.conj(), lambda i: (_complex(i)[0].to(device),), wrap=wrap)


def contiguity_decides(x: Tensor) -> Tensor:
    return x * 2 if x.is_contiguous() else x * 3


def stride_enters(x: Tensor) -> Tensor:
    return x * x.stride(0)


def offset_enters(x: Tensor) -> Tensor:
    return x + x.storage_offset()


def gradient_flag_decides(x: Tensor) -> Tensor:
    return (x * 2 if x.requires_grad else x * 3).detach()


def type_decides(x: Tensor) -> Tensor:
    return (x * 2 if isinstance(x, nn.Parameter) else x * 3).detach()


def attribute_enters(x: Tensor) -> Tensor:
    return (x * getattr(x, "scale", 1.0)).detach()


def attribute_decides(x: Tensor) -> Tensor:
    return (x * 2 if hasattr(x, "scale") else x * 3).detach()


def view_decides(x: Tensor) -> Tensor:
    return (x * 2 if x._base is not None else x * 3).detach()


def leaf_decides(x: Tensor) -> Tensor:
    return (x * 2 if x.is_inference() else x * 3).detach()


def storage_size_enters(x: Tensor) -> Tensor:
    return (x * (x.untyped_storage().nbytes() // 16)).detach()


def _scaled(x: Tensor, scale: float) -> Tensor:
    x.scale = scale  # type: ignore[attr-defined]
    return x


FORMS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x.t().contiguous().t(),
    lambda x: torch.cat([x, x])[2:6],
    lambda x: nn.Parameter(x, requires_grad=False),
    lambda x: _scaled(x.clone(), 3.0),
    lambda x: _scaled(x.clone(), 4.0),
    lambda x: x[:],
    lambda x: x,
)
for _function in (
    *(contiguity_decides, stride_enters, offset_enters, gradient_flag_decides, type_decides, attribute_enters),
    *(attribute_decides, view_decides, leaf_decides, storage_size_enters),
):

    def _formed(device: torch.device, function: Callable[..., Any] = _function) -> Run:
        return Run(function, lambda i: (FORMS[i // 2 % len(FORMS)](noise(i, 4, 4, device=device)),))

    _formed.__name__ = _function.__name__
    hazard("C", calls=2 * len(FORMS))(_formed)


@hazard("C", calls=8)
def identity_of_arguments(device: torch.device) -> Run:
    def arguments(i: int) -> tuple[Any, ...]:
        k = noise(i, 3, 4, device=device)
        return (k, k if i in (0, 1, 2, 5) else k.clone())

    return Run(lambda k, v: k * 2 if k is v else k * 3, arguments)


@hazard("C", calls=8)
def identity_of_an_argument_and_state(device: torch.device) -> Run:
    held = noise(0, 3, 4, device=device)
    return Run(lambda x: x * 2 if x is held else x * 3, lambda i: (held if i in (3, 4, 7) else held.clone(),))


@hazard("C", contexts=("grad", NO_GRAD, INFERENCE), calls=6)
def grad_mode_decides(device: torch.device) -> Run:
    return Run(lambda x: x * 2 if torch.is_grad_enabled() else x * 3, lambda i: (noise(i, 3, 4, device=device),))


@hazard("C", contexts=("grad", NO_GRAD, INFERENCE), calls=8)
def grad_mode_changes(device: torch.device) -> Run:
    def wrap(step: Any) -> Any:
        def call(x: Tensor, i: int) -> Tensor:
            with torch.set_grad_enabled(i in (3, 6)):
                return step(x)

        return call

    return Run(*(lambda x: x * 2 if torch.is_grad_enabled() else x * 3, lambda i: (noise(i, 3, 4, device=device), i)), wrap=wrap)


@hazard("C", calls=8)
def inference_mode_decides(device: torch.device) -> Run:
    return Run(lambda x: x * 2 if torch.is_inference_mode_enabled() else x * 3, lambda i: (noise(i, 3, 4, device=device),))


@hazard("C")
def output_of_another_thread(device: torch.device) -> Run:
    pool = ThreadPoolExecutor(1, "hazard")
    return Run(lambda x: pool.submit(torch.relu, x).result(), lambda i: (noise(i, 3, 4, device=device),))


@hazard("C")
def input_of_another_thread(device: torch.device) -> Run:
    pool = ThreadPoolExecutor(1, "hazard")
    return Run(lambda x: pool.submit(torch.relu, x * 2).result() + 1, lambda i: (noise(i, 3, 4, device=device),))


@hazard("C")
def boundaries_on_the_host(device: torch.device) -> Run:
    return Run(
        lambda x, at: torch.tensor_split(x, at), lambda i: (noise(i, 6, 4, device=device), torch.tensor([1 + i % 3, 4 + i % 2]))
    )


@hazard("C")
def number_of_sections_on_the_host(device: torch.device) -> Run:
    return Run(lambda x, n: torch.tensor_split(x, n)[0], lambda i: (noise(i, 6, 4, device=device), torch.tensor(1 + i % 3)))


@hazard("C")
def lengths_on_the_host(device: torch.device) -> Run:
    def step(x: Tensor, lengths: Tensor) -> Tensor:
        return nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False).data.sum(0)

    return Run(step, lambda i: (noise(i, 3, 4, 2, device=device), torch.tensor([1 + i % 4, 4, 2])))


SETTINGS = types.ModuleType("hazard_settings")
SETTINGS.__dict__.update(scale=2.0, nested=types.SimpleNamespace(on=True), table={"s": 1.0})
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE", default=2.0)
BUFFER, WIDE = bytearray(8), array.array("f", [1.0, 2.0])
VIEW = memoryview(BUFFER)
ARRAY = numpy.array([1.0, 2.0], dtype=numpy.float32)


def by_default(x: Tensor, by: float = 2.0, *, plus: float = 1.0) -> Tensor:
    return x * by + plus


class Base:
    factor = 2.0

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.factor

    @staticmethod
    def fixed(x: Tensor) -> Tensor:
        return x + 1


class Derived(Base, nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.fixed(self.scaled(x))


def _setting(name: str, step: Callable[..., Any], values: tuple[Any, Any], put: Callable[[Any], object], **settings: Any) -> None:
    """A hazard about a setting that takes another value at call 5, and the first again at call 7."""

    def make(device: torch.device) -> Run:
        put(values[0])

        def change(i: int) -> None:
            if i in (5, 7):
                put(values[i == 5])

        return Run(step, lambda i: (noise(i, 3, 4, device=device),), change, restore=lambda: put(values[0]))

    make.__name__ = name
    hazard("C", calls=9, **settings)(make)


def _class_method(value: Any) -> None:
    Base.scaled = value  # type: ignore[method-assign]


def _static_method(value: Any) -> None:
    Base.fixed = staticmethod(value)  # type: ignore[method-assign]


_setting("module_attribute", lambda x: x * SETTINGS.scale, (2.0, 3.0), lambda v: setattr(SETTINGS, "scale", v))
_setting(
    "object_of_a_module", lambda x: x * 2 if SETTINGS.nested.on else x, (True, False), lambda v: setattr(SETTINGS.nested, "on", v)
)
_setting("dict_of_a_module", lambda x: x * SETTINGS.table["s"], (1.0, 3.0), lambda v: SETTINGS.table.update(s=v))
_setting("environment", lambda x: x * float(os.environ["HAZARD"]), ("2", "3"), lambda v: os.environ.update(HAZARD=v))
_setting(
    "environment_by_getenv",
    lambda x: x * 2 if os.getenv("HAZARD") == "2" else x,
    ("2", "3"),
    lambda v: os.environ.update(HAZARD=v),
)
_setting("default_of_a_function", lambda x: by_default(x), ((2.0,), (3.0,)), lambda v: setattr(by_default, "__defaults__", v))
_setting("keyword_default", lambda x: by_default(x), (1.0, 3.0), lambda v: by_default.__kwdefaults__.update(plus=v))
_setting("default_dtype", lambda x: x + torch.ones(4, device=x.device), (torch.float32, torch.float64), torch.set_default_dtype)
_setting("default_dtype_of_a_number", lambda x: x * torch.tensor(2.0), (torch.float32, torch.float64), torch.set_default_dtype)
_setting("context_variable", lambda x: x * VARIABLE.get(), (2.0, 3.0), VARIABLE.set)
_setting("array_of_numbers", lambda x: x * WIDE[0], (1.0, 3.0), lambda v: WIDE.__setitem__(0, v))
_setting("bytes_of_a_buffer", lambda x: x * BUFFER[0], (1, 3), lambda v: BUFFER.__setitem__(0, v))
_setting("view_of_a_buffer", lambda x: x * VIEW[1], (1, 3), lambda v: BUFFER.__setitem__(1, v))
_setting("numpy_array", lambda x: x * float(ARRAY[0]), (1.0, 3.0), lambda v: ARRAY.__setitem__(0, v))
_setting("class_attribute", Derived(), (2.0, 3.0), lambda v: setattr(Base, "factor", v))
_setting("method_of_a_class", Derived(), (Base.scaled, lambda self, x: x * 5), _class_method)
_setting("static_method_of_a_class", Derived(), (Base.fixed, lambda x: x * 5), _static_method)
_setting(
    "function_of_a_module",
    lambda x: nn.functional.relu(x),
    (nn.functional.relu, torch.tanh),
    lambda v: setattr(nn.functional, "relu", v),
)
_setting("partial", functools.partial(by_default, plus=2.0), ((2.0,), (3.0,)), lambda v: setattr(by_default, "__defaults__", v))
_setting("thread_count", lambda x: x * torch.get_num_threads(), (1, 2), torch.set_num_threads)


@hazard("C", calls=8)
def hook_on_every_module(device: torch.device) -> Run:
    model, handles = nn.Linear(4, 4).eval().to(device), []

    def change(i: int) -> None:
        if i == 5:
            handles.append(nn.modules.module.register_module_forward_hook(lambda m, a, output: output * 2))
        if i == 7:
            handles.pop().remove()

    return Run(model, lambda i: (noise(i, 3, 4, device=device),), change, restore=lambda: [one.remove() for one in handles])


@hazard("C", contexts=(NO_GRAD,))
def file_that_is_read(device: torch.device) -> Run:
    path = Path(tempfile.mkdtemp()) / "scale"
    path.write_text("2")
    return Run(
        lambda x: x * float(path.read_text()),
        lambda i: (noise(i, 3, 4, device=device),),
        lambda i: path.write_text(str(2 + i // 3)),
    )


@hazard("C", contexts=(NO_GRAD,))
def numpy_buffer_that_overlaps(device: torch.device) -> Run:
    memory = numpy.zeros(12, dtype=numpy.float32)
    first, second = torch.from_numpy(memory[:8]), torch.from_numpy(memory[4:])

    def step(x: Tensor) -> Tensor:
        first.add_(x.cpu()[0, 0])
        return second * 2

    return Run(step, lambda i: (noise(i, 3, 4, device=device),), after=lambda: memory.tolist())


@hazard("C", contexts=(NO_GRAD,))
def array_that_two_tensors_share(device: torch.device) -> Run:
    memory = array.array("f", [0.0] * 8)
    first, second = torch.frombuffer(memory, dtype=torch.float32), torch.frombuffer(memory, dtype=torch.float32, offset=8)

    def step(x: Tensor) -> Tensor:
        second.mul_(0.5).add_(x.cpu()[0, 1])
        return first + 1

    return Run(step, lambda i: (noise(i, 3, 4, device=device),), after=lambda: memory.tolist())


@hazard("C", contexts=(NO_GRAD,))
def buffer_written_through_numpy(device: torch.device) -> Run:
    memory = numpy.ones(4, dtype=numpy.float32)
    table = torch.from_numpy(memory)

    def step(x: Tensor) -> Tensor:
        memory[0] += 1
        return x.cpu() * table

    return Run(step, lambda i: (noise(i, 3, 4, device=device),), after=lambda: memory.tolist())


class Short(float):
    """A float that shows one digit only."""

    def __repr__(self) -> str:
        return f"{self:.1f}"


class Text(str):
    """Texts that look alike."""

    factor = 1.0

    def __repr__(self) -> str:
        return "'text'"


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Alike(enum.Enum):
    """Members that show and hash alike."""

    ONE = 1
    TWO = 2

    def __repr__(self) -> str:
        return "same"

    def __hash__(self) -> int:
        return 0


def _keys(name: str, step: Callable[..., Any], keys: tuple[Any, ...], **settings: Any) -> None:
    def make(device: torch.device) -> Run:
        return Run(step, lambda i: (noise(i, 3, 4, device=device), keys[i % len(keys)]))

    make.__name__ = name
    hazard("C", calls=8, **settings)(make)


_keys("float_with_a_short_text", lambda x, k: x * k, (Short(1.01), Short(1.04)))
_keys("text_with_a_fixed_text", lambda x, k: x * len(k), (Text("a"), Text("abc")))
_keys("flags_without_names", lambda x, k: x * int(k), (Flags(4), Flags(8), Flags(3)))
_keys("members_that_look_alike", lambda x, k: x * k.value, (Alike.ONE, Alike.TWO))
_keys("numbers_that_are_equal", lambda x, k: x * 2 if type(k) is int else x * 3 if type(k) is float else x, (1, 1.0, True))
_keys("dict_keys_that_are_equal", lambda x, k: x * 2 if type(next(iter(k))) is int else x, ({1: 5}, {1.0: 5}, {True: 5}))
_keys("zeros_of_both_signs", lambda x, k: x / torch.full_like(x, k), (0.0, -0.0))
_keys("slices_that_differ", lambda x, k: x[k], (slice(0, 1), slice(0, 2), slice(0, 2, 1)))
_keys("sets_as_arguments", lambda x, k: x * len(k), (frozenset({1}), frozenset({1, 2})))


def seeded(x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return x + torch.rand(4).to(x.device)


def seeded_without_draw(x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return x * 2


def state_set(x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    y = x + torch.rand(4).to(x.device)
    torch.set_rng_state(state)
    return y


def forked(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        y = x + torch.rand(4).to(x.device)
    return y


def python_seeded(x: Tensor) -> Tensor:
    random.seed(3)
    return x * random.random()


def python_draw(x: Tensor) -> Tensor:
    return x * random.random()


steps(
    "C",
    seeded,
    seeded_without_draw,
    state_set,
    forked,
    python_seeded,
    python_draw,
    arguments=lambda i: (noise(i, 3, 4),),
    calls=8,
)


@hazard("C", contexts=(NO_GRAD,), calls=8)
def lines_written_to_a_file(device: torch.device) -> Run:
    path = Path(tempfile.mkdtemp()) / "log"

    def step(x: Tensor) -> Tensor:
        with path.open("a") as file:
            file.write("called\n")
        return x * 2

    return Run(step, lambda i: (noise(i, 3, 4, device=device),), after=path.read_text)


@hazard("C", contexts=(NO_GRAD,), calls=8)
def lines_printed(device: torch.device) -> Run:
    import io
    from contextlib import redirect_stdout

    out = io.StringIO()

    def wrap(step: Any) -> Any:
        def call(x: Tensor) -> Tensor:
            with redirect_stdout(out):
                return step(x)

        return call

    def step(x: Tensor) -> Tensor:
        print("called")
        return x * 2

    return Run(step, lambda i: (noise(i, 3, 4, device=device),), after=out.getvalue, wrap=wrap)


@hazard("C", contexts=(NO_GRAD,), calls=8)
def queue_that_is_fed(device: torch.device) -> Run:
    import queue

    told: queue.SimpleQueue[int] = queue.SimpleQueue()

    def step(x: Tensor) -> Tensor:
        told.put(1)
        return x * 2

    return Run(step, lambda i: (noise(i, 3, 4, device=device),), after=told.qsize)


@hazard("C", contexts=(NO_GRAD,), calls=6)
def interrupted(device: torch.device) -> Run:
    counts, total = {"calls": 0, "interrupts": 0}, torch.zeros((), device=device)

    def step(x: Tensor) -> Tensor:
        counts["calls"] += 1
        total.add_(1)
        if counts["interrupts"] == 1 and counts["calls"] > 1:
            raise KeyboardInterrupt
        return x * 2 + total

    def wrap(called: Any) -> Any:
        def call(x: Tensor, i: int) -> Any:
            counts["interrupts"] = max(counts["interrupts"], int(i == 1))
            before = counts["calls"], total.clone()
            try:
                return called(x)
            except KeyboardInterrupt:
                counts["interrupts"] = 2
                if called is step:  # eager keeps half of the call; a captured step takes it back
                    counts["calls"] = before[0]
                    total.copy_(before[1])
                return "interrupted"

        return call

    return Run(
        *(step, lambda i: (noise(i, 3, 4, device=device), i)),
        after=lambda: float(total) == counts["calls"],
        wrap=wrap,
    )
