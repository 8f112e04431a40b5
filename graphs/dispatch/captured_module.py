"""`capture`, and what it returns: looks like the model, replays recordings. `graphs.dispatch.dispatcher` does the work."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypedDict, TypeVar, overload

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from graphs.config import MODES, AllPasses, CaptureConfig, Compiler, Mode, Outputs, Pass, Verify
from graphs.contract.padding import Padding, Policy
from graphs.dispatch.dispatcher import Dispatcher
from graphs.dispatch.module.delegation import delegate, returning_step
from graphs.dispatch.module.forward_hooks import KINDS, call_with_hooks, no_hooks
from graphs.eager_mode import forced_by
from graphs.environment import choice
from graphs.errors import ConfigError
from graphs.ops.wo_a.module import bytes_by_path
from graphs.report import CaptureReport, SizesReport, merged

if TYPE_CHECKING:
    from typing_extensions import Unpack

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Forward(Protocol[P, R_co]):
    """An ``nn.Module``, as a type checker sees what it is called with: by the signature of its ``forward``."""

    def forward(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """One step."""
        ...


class CaptureSettings(TypedDict, total=False):
    """The keyword arguments of `capture`, with the types that they may have."""

    mode: Mode | None
    buckets: Iterable[int] | None
    batch_dims: Mapping[str, int] | None
    static: Iterable[str]
    padding: Mapping[str, Padding | Policy] | None
    outputs: Outputs
    verify: Verify | None
    strict: bool | None
    max_recordings: int | None
    memory_budget: int | str | None
    compiler: Compiler | None
    compiler_options: Mapping[str, Any] | None
    passes: AllPasses | Iterable[Pass] | None
    bounds: Mapping[str, int] | None
    name: str | None
    ranges: bool | None


@overload
def capture(model: Forward[P, R], **settings: Unpack[CaptureSettings]) -> CapturedModule[P, R]: ...
@overload
def capture(model: Callable[P, R], **settings: Unpack[CaptureSettings]) -> CapturedStep[P, R]: ...
def capture(
    model: Any,
    *,
    mode: Mode | None = None,
    buckets: Iterable[int] | None = None,
    batch_dims: Mapping[str, int] | None = None,
    static: Iterable[str] = (),
    padding: Mapping[str, Padding | Policy] | None = None,
    outputs: Outputs = "owned",
    verify: Verify | None = None,
    strict: bool | None = None,
    max_recordings: int | None = None,
    compiler: Compiler | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    passes: AllPasses | Iterable[Pass] | None = None,
    bounds: Mapping[str, int] | None = None,
    memory_budget: int | str | None = None,
    name: str | None = None,
    ranges: bool | None = None,
) -> Any:
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
            ``GRAPHS_MEMORY_BUDGET``, else no limit, but for `CapturedStep.record`.
        compiler: ``"inductor"`` compiles the step once per key with ``torch.compile`` and records what that gives; ``"auto"``
            records both and keeps the faster; ``"none"`` (default) records the operators as the model calls them. A step
            that cannot be compiled is recorded uncompiled, with the reason. Default ``GRAPHS_COMPILER``, else ``"none"``.
        compiler_options: settings of Inductor, as ``torch.compile(options=...)`` takes them, and ``"skinny_products"``,
            ``"one_query_attention"``, ``"expert_products"``, ``"repeated_heads"``, ``"norm_prologues"``,
            ``"product_epilogues"`` and ``"hyper_connections"``: rewrites of the compiled step, each True, False or (default) on
            where it was measured to be faster, on devices of compute capability 9.0; the last three, one of them a rewrite of
            the uncompiled step too, are on nowhere yet.
        passes: what takes host values out of a step that reads them (``.item()``, ``nonzero``, branches on tensors):
            ``"auto"`` (default) all passes, ``"off"`` none, or their names, of ``constants``, ``addressing``,
            ``arithmetic``, ``bounded``, ``branches`` and ``fusion``. Default ``GRAPHS_PASSES``, else ``"auto"``.
        bounds: largest values of lengths that nothing in the step bounds, by the variable that holds them
            (``{"n": 4096}`` for ``n = int(t)``) or by ``"file.py:line"``. A length above its bound runs eagerly.
        name: what the step is called in events, log lines and traces; default: its class, or the function's name.
        ranges: mark recording and replays in traces. True: as NVTX ranges, at every call, for a profiler that is not PyTorch's.
            None (default): while PyTorch's profiler runs. False: never. Default ``GRAPHS_RANGES``, else None.

    Returns:
        A `CapturedModule`, which is an ``nn.Module``, for an ``nn.Module``, and a `CapturedStep` for anything else.

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
        name=name,
        ranges=ranges,
    )
    if not callable(model):
        raise ConfigError("model", model, "an nn.Module or a callable")
    return CapturedModule(model, config) if isinstance(model, nn.Module) else CapturedStep(model, config)


ATTRIBUTES: dict[str, Callable[[CapturedStep[Any, Any]], Any]] = {}
"""Attributes that a captured step has in place of its model's, where the function returns one."""


class CapturedStep(Generic[P, R_co]):
    """A callable with recordings: made by `capture`, called like the callable.

    Attributes of the model are read and written through it (``step.config``, ``step.parameters()``, ``step.eval()``).
    Its own are `mode`, `report`, `record`, `record_buckets` and `invalidate`, and ``generate`` of models of transformers, which
    does as that of an accelerated model (`graphs.accelerate`). Other methods of the model that call the model themselves call
    the model, not its recordings.
    """

    def __init__(self, model: Callable[P, R_co], config: CaptureConfig) -> None:
        object.__setattr__(self, "_graphs_model", model)
        object.__setattr__(self, "_graphs_mode", config.mode)
        object.__setattr__(self, "_graphs_aside", config.mode == "eager")
        object.__setattr__(self, "_graphs_recordings", Dispatcher(model, config))

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run one step: replay it if its key is recorded, else try to record it, else run the model."""
        if torch.compiler.is_dynamo_compiling() or self._graphs_aside or forced_by():
            return self._graphs_call_aside(args, kwargs)
        return self._graphs_recordings.call(args, kwargs)

    def _graphs_call_aside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that is not just to be replayed."""
        if torch.compiler.is_dynamo_compiling():
            return self._graphs_model(*args, **kwargs)  # a part of what is being compiled
        if self._graphs_mode == "eager" or forced_by():
            return self._graphs_recordings.run_eagerly(args, kwargs)
        return self._graphs_recordings.call(args, kwargs)

    def _graphs_is_aside(self) -> bool:
        """Whether calls are not just to be replayed, which they find out by one attribute."""
        return bool(self._graphs_mode == "eager")

    @property
    def mode(self) -> Mode:
        """``"graph"`` or ``"eager"``; may be set at run time. Recordings are kept while eager."""
        mode: Mode = self._graphs_mode
        return mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        object.__setattr__(self, "_graphs_mode", choice("mode", value, MODES))
        object.__setattr__(self, "_graphs_aside", self._graphs_is_aside())

    def report(self) -> CaptureReport:
        """What was recorded, replayed and refused so far, and why."""
        report = self._graphs_recordings.report(self.mode)
        if (generate := self.__dict__.get("_graphs_generate")) is not None:
            report = merged([report, generate.report()])
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
            Exception: what the step itself raises at a size. Those before it stay.
        """
        recordings: Dispatcher = self._graphs_recordings
        return recordings.record(example, sizes, memory_budget, progress=progress)

    def record_buckets(self, /, *args: Any, **kwargs: Any) -> SizesReport:
        """Record every bucket ahead of serving: `record` with this call as the example, and without a bar.

        Raises:
            ConfigError: there are no buckets, or the batch dimension is neither declared nor inferred yet.
            Refusal: a bucket cannot be recorded.
            Exception: what the step itself raises.
        """
        return self.record((args, kwargs), progress=False)

    def invalidate(self) -> None:
        """Drop every recording and every refusal remembered: after weights, caches or the model were replaced."""
        self._graphs_recordings.invalidate()

    def __getattr__(self, name: str) -> Any:
        ours = ATTRIBUTES[name](self) if name in ATTRIBUTES else None
        if ours is not None:
            return ours
        return returning_step(getattr(self._graphs_model, name), name, self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mode":
            object.__setattr__(self, name, value)
        else:
            setattr(self._graphs_model, name, value)
            self._graphs_recordings.drop_outdated()

    def __delattr__(self, name: str) -> None:
        delattr(self._graphs_model, name)
        self._graphs_recordings.drop_outdated()

    def __graphs_walk__(self) -> Any:
        """What a walk over Python state enters in place of this object."""
        return self._graphs_model

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._graphs_model), *dir(type(self))})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._graphs_model!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedStep[P, R_co]:
        return type(self)(copy.deepcopy(self._graphs_model, memo), self._graphs_recordings.config)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._graphs_model, self._graphs_recordings.config)


class CapturedModule(CapturedStep[P, R_co], nn.Module):
    """A captured ``nn.Module``, which is one itself.

    Its parameters, buffers, submodules, state dict (with the same keys), training mode and backward hooks are the model's, in a
    parent module too; a walk over modules meets the model. Forward hooks that are registered on it are its own: they
    run at each call, replayed or not. Those of the model and of modules inside are a part of the step.
    A deep copy and a pickled one have the model's state, the settings and the hooks, and no recordings.
    """

    def __init__(self, model: Callable[P, R_co], config: CaptureConfig) -> None:
        super().__init__(model, config)
        self.__setstate__(no_hooks())

    def _graphs_is_aside(self) -> bool:
        return super()._graphs_is_aside() or bool(self._forward_hooks or self._forward_pre_hooks)

    def _graphs_call_aside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that is not just to be replayed, with the forward hooks around it."""
        if self._forward_hooks or self._forward_pre_hooks:
            return call_with_hooks(self, super()._graphs_call_aside, args, kwargs)
        return super()._graphs_call_aside(args, kwargs)

    def register_forward_hook(self, hook: Callable[..., Any], **settings: Any) -> RemovableHandle:  # type: ignore[override]
        """Call ``hook`` after each call of the captured module; see ``nn.Module.register_forward_hook``."""
        return self._graphs_hooked(super().register_forward_hook(hook, **settings))

    def register_forward_pre_hook(self, hook: Callable[..., Any], **settings: Any) -> RemovableHandle:  # type: ignore[override]
        """Call ``hook`` before each call of the captured module; see ``nn.Module.register_forward_pre_hook``."""
        return self._graphs_hooked(super().register_forward_pre_hook(hook, **settings))

    def _graphs_hooked(self, handle: RemovableHandle) -> RemovableHandle:
        object.__setattr__(self, "_graphs_aside", True)
        return handle

    def __setstate__(self, hooks: dict[str, Any]) -> None:
        for kind in KINDS:
            object.__setattr__(self, kind, hooks[kind])
        object.__setattr__(self, "_graphs_aside", self._graphs_is_aside())

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule[P, R_co]:
        twin = type(self)(copy.deepcopy(self._graphs_model, memo), self._graphs_recordings.config)
        twin.__setstate__(copy.deepcopy({kind: getattr(self, kind) for kind in KINDS}, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return *super().__reduce__(), {kind: getattr(self, kind) for kind in KINDS}


delegate(CapturedModule)
