"""`capture`, and the module it returns: looks like the model, replays recordings. `graphs.dispatch.dispatcher` does the work."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch

from graphs.config import MODES, CaptureConfig
from graphs.contract.padding import Padding
from graphs.dispatch.dispatcher import Dispatcher
from graphs.eager_mode import forced_by
from graphs.environment import choice
from graphs.errors import ConfigError
from graphs.ops.wo_a.module import bytes_by_path
from graphs.report import CaptureReport, SizesReport

Model = TypeVar("Model", bound=Callable[..., Any])

_SELF_RETURNING = frozenset(
    "eval train to cuda cpu half float double bfloat16 type requires_grad_ apply share_memory to_empty".split()  # noqa: SIM905
)


def capture(
    model: Model,
    *,
    mode: str | None = None,
    buckets: Iterable[int] | None = None,
    batch_dims: Mapping[str, int] | None = None,
    static: Iterable[str] = (),
    padding: Mapping[str, Padding | str] | None = None,
    outputs: str = "owned",
    verify: str | None = None,
    strict: bool | None = None,
    max_recordings: int | None = None,
    compiler: str | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    passes: str | Iterable[str] | None = None,
    bounds: Mapping[str, int] | None = None,
    memory_budget: int | str | None = None,
) -> CapturedModule[Model]:
    """Return a callable that looks like ``model`` and records its steps, to replay them without Python.

    The first call of a key (structure, shapes, dtypes, devices and constants of the arguments) is watched, recorded and
    compared with eager; later calls replay. Recorded calls run without autograd. Tensors are copied into the recording
    at each call, except those the step writes in place (a KV cache) and everything it reaches without being given it
    (weights, buffers, the tensors of a cache object): they are read where they are, and checked to be there.

    Args:
        model: an ``nn.Module`` or any callable, taking any pytree of arguments.
        mode: ``"graph"`` or ``"eager"``; default ``GRAPHS_MODE``, else ``"graph"``. `CapturedModule.mode` changes it.
        buckets: batch sizes to record at; a batch is padded to the next one and its outputs are cut back. A step whose
            rows are found to interact is recorded at its exact sizes. Default ``GRAPHS_BUCKETS``, else exact sizes.
        batch_dims: the batch dimension of each padded argument, by name (``{"input_ids": 0}``). Without it the
            dimension is inferred once two calls prove it.
        static: names of tensor arguments to read in place instead of copying; they must not move.
        padding: what padded rows hold, by argument: ``"repeat"`` (the last real row, default), ``"zero"``, ``"keep"``
            or ``graphs.sentinel(value)``.
        outputs: ``"owned"`` (default): new tensors at each call; ``"borrowed"``: the recording's own, overwritten by
            the next call.
        verify: ``"capture"`` (default) compares the first replay of each key with eager; ``"always"`` each replay;
            ``"off"`` none. Default ``GRAPHS_VERIFY``.
        strict: raise a refusal instead of running eagerly. Default ``GRAPHS_STRICT``, else False.
        max_recordings: recordings to keep at most; a new one then takes the place of the one used least recently. Default
            ``GRAPHS_MAX_RECORDINGS``, else 64.
        memory_budget: bytes, or text like ``"2GiB"``, that all recordings may take; what does not fit runs eagerly. Default
            ``GRAPHS_MEMORY_BUDGET``, else no limit, but for `CapturedModule.record`.
        compiler: ``"inductor"`` compiles the step once per key with ``torch.compile`` and records what that gives; ``"auto"``
            records both and keeps the faster; ``"none"`` (default) records the operators as the model calls them. A step
            that cannot be compiled is recorded uncompiled, with the reason. Default ``GRAPHS_COMPILER``, else ``"none"``.
        compiler_options: settings of Inductor, as ``torch.compile(options=...)`` takes them, and ``"skinny_products"`` and
            ``"one_query_attention"``: rewrites of the compiled step, each True, False or (default) on where it was measured
            to be faster, on devices of compute capability 9.0.
        passes: what takes host values out of a step that reads them (``.item()``, ``nonzero``, branches on tensors):
            ``"auto"`` (default) all passes, ``"off"`` none, or their names, of ``constants``, ``addressing``,
            ``arithmetic``, ``bounded``, ``branches`` and ``fusion``. Default ``GRAPHS_PASSES``, else ``"auto"``.
        bounds: largest values of lengths that nothing in the step bounds, by the variable that holds them
            (``{"n": 4096}`` for ``n = int(t)``) or by ``"file.py:line"``. A length above its bound runs eagerly.

    Raises:
        ConfigError: an argument or a ``GRAPHS_*`` variable is not legal.
        Refusal: with ``strict=True``, at a call that cannot be replayed.
    """
    config = CaptureConfig.resolve(
        mode=mode,
        buckets=buckets,
        batch_dims=batch_dims,
        static=static,
        padding=padding,
        outputs=outputs,
        verify=verify,
        strict=strict,
        max_recordings=max_recordings,
        compiler=compiler,
        compiler_options=compiler_options,
        passes=passes,
        bounds=bounds,
        memory_budget=memory_budget,
    )
    if not callable(model):
        raise ConfigError("model", model, "an nn.Module or a callable")
    return CapturedModule(model, config)


class CapturedModule(Generic[Model]):
    """A model with recordings: made by `capture`, called like the model.

    Attributes of the model are read and written through it (``step.config``, ``step.parameters()``, ``step.eval()``).
    Its own are `mode`, `report`, `record`, `record_buckets` and `invalidate`. Methods of the model that call the model
    themselves (``generate``) call the model, not its recordings.
    """

    def __init__(self, model: Model, config: CaptureConfig) -> None:
        object.__setattr__(self, "_graphs_model", model)
        object.__setattr__(self, "_graphs_mode", config.mode)
        object.__setattr__(self, "_graphs_recordings", Dispatcher(model, config))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run one step: replay it if its key is recorded, else try to record it, else run the model."""
        if torch.compiler.is_dynamo_compiling():
            return self._graphs_model(*args, **kwargs)  # a part of what is being compiled
        if self._graphs_mode == "eager" or forced_by():
            return self._graphs_recordings.run_eagerly(args, kwargs)
        return self._graphs_recordings.call(args, kwargs)

    @property
    def mode(self) -> str:
        """``"graph"`` or ``"eager"``; may be set at run time. Dispatcher are kept while eager."""
        return str(self._graphs_mode)

    @mode.setter
    def mode(self, value: str) -> None:
        object.__setattr__(self, "_graphs_mode", choice("mode", value, MODES))

    def report(self) -> CaptureReport:
        """What was recorded, replayed and refused so far, and why."""
        report = self._graphs_recordings.report(self.mode)
        return dataclasses.replace(report, projection_bytes=bytes_by_path(self._graphs_model))

    def record(
        self,
        example: Any,
        *,
        sizes: Iterable[int] | None = None,
        memory_budget: int | str | None = None,
        progress: bool = True,
    ) -> SizesReport:
        """Record batch sizes ahead of serving, the largest first, all in one pool of memory. The step's state is left as it was.

        Call it in the modes that the step is called in, for example under ``torch.no_grad()``.

        Args:
            example: the arguments of one call: a tuple, a dict of keyword arguments, or a pair of both. Along ``batch_dims`` its
                rows are cut off, or the last one is repeated. Or a function of the size that returns one of these, for example
                with a cache of its own for each size, which the caller keeps.
            sizes: numbers of rows; with ``buckets``, some of these. Default: all buckets.
            memory_budget: bytes, or text like ``"2GiB"``, that all recordings of the step may take from now on. Default: that
                of `capture`, else four fifths of what is free on the device, for this call only. A size that is estimated not to
                fit beside those that were recorded is not, and its example runs eagerly: the report says what it needs and what
                is left. With ``strict`` that is raised.
            progress: show a bar and the table where the error stream is a terminal. The logger ``graphs`` is told in any case.

        Returns:
            Seconds, bytes and time of a replay of each size, and what was estimated after the first; ``str()`` gives a table.

        Raises:
            ConfigError: before anything runs: sizes or a budget that are not legal, an example without rows or of another size,
                no known batch dimension, or a budget below what the arguments alone take.
            Refusal: a size cannot be recorded, or the largest takes more than the budget. Those before it stay.
        """
        recordings: Dispatcher = self._graphs_recordings
        return recordings.record(example, sizes, memory_budget, progress=progress)

    def record_buckets(self, /, *args: Any, **kwargs: Any) -> SizesReport:
        """Record every bucket ahead of serving: `record` with this call as the example, and without a bar.

        Raises:
            ConfigError: there are no buckets, or the batch dimension is neither declared nor inferred yet.
            Refusal: a bucket cannot be recorded.
        """
        return self.record((args, kwargs), progress=False)

    def invalidate(self) -> None:
        """Drop every recording and every refusal remembered: after weights, caches or the model were replaced."""
        self._graphs_recordings.invalidate()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._graphs_model, name)
        if name in _SELF_RETURNING and callable(value):
            return self._returning_self(value)
        return value

    def _returning_self(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self._graphs_model else result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mode":
            object.__setattr__(self, name, value)
        else:
            setattr(self._graphs_model, name, value)
            self.invalidate()

    def __delattr__(self, name: str) -> None:
        delattr(self._graphs_model, name)
        self.invalidate()

    def __graphs_walk__(self) -> Any:
        """What a walk over Python state enters in place of this object."""
        return self._graphs_model

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._graphs_model), *type(self).__dict__})

    def __repr__(self) -> str:
        return f"CapturedModule({self._graphs_model!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule[Model]:
        return CapturedModule(copy.deepcopy(self._graphs_model, memo), self._graphs_recordings.config)

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedModule, (self._graphs_model, self._graphs_recordings.config)
