"""The function mode of a watched run: conversions to host objects, which never reach the dispatcher on CPU tensors."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from graphs.errors import AutogradInput, HiddenRead, HostSync, Site, UnsupportedArgument
from graphs.observation.grad_questions import GRAD_PROPERTIES
from graphs.observation.host_reads import FROM_LISTS, OF_THE_OBJECT, SPLITS, TO_HOST, leaves_the_device
from graphs.observation.watching import Watching
from graphs.python_reads.call_hook import Awake, resting, wake
from graphs.state.storage import has_storage, tensors_in
from passes import inside
from passes.core.composites import Calls, called
from passes.core.modes.patched_functions import as_torch_made
from passes.core.source_location import is_user, user_line

Tensor = torch.Tensor
_VERSION = getattr(Tensor, "_version").__get__  # noqa: B009  # its stub is a number
_ASKED = "decide by shape, strides, dtype or values instead, or pass what was decided as an argument"
_ADDRESSES = (Tensor.data_ptr, Tensor.untyped_storage)
_PLAIN = (Tensor, torch.nn.Parameter)
_LENDS = ("numpy", "__array__", "__dlpack__")


class Conversions(Calls):
    """Reports conversions to host objects, and tells the dispatch mode which Python function is running."""

    def __init__(self, watch: Watching) -> None:
        super().__init__()
        self.watch = watch
        self.grad_mode = torch.is_grad_enabled()  # the caller's; a step runs without

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hook = resting()
        try:
            if hook is not None:
                self.watch.awake = Awake(hook)
            caller = sys._getframe(1)
            func = as_torch_made(func, caller)
            with inside(func, args):
                return self._run(func, args, kwargs or {}, caller)
        finally:
            wake(hook)

    def _run(self, func: Any, args: Any, kwargs: Any, caller: FrameType) -> Any:
        if self.grad_mode and func in GRAD_PROPERTIES:
            self._asked_of(args[0], GRAD_PROPERTIES[func], caller)
        if func is torch._C._set_grad_enabled:
            self.watch.grad.switched(args[0], caller)
        if func in FROM_LISTS:
            self._read_elements(func, args, kwargs)
        elif func in SPLITS and any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
            detail, site = "the boundaries are read on the host", Site.at(user_line(caller))
            self.watch.trace.found(HiddenRead(detail, operator="torch.tensor_split", site=site), "tensor_split")
        elif func in OF_THE_OBJECT and not self.watch.inside:
            self._hand_out(func, args)
            self._read_property(func, args, _asking(caller))
        self.watch.function.append(func)
        try:
            if func in TO_HOST and leaves_the_device(func, args, kwargs):
                return self._convert(func, args, kwargs)
            with called(func), self.watch.awake:
                return func(*args, **kwargs)
        finally:
            self.watch.function.pop()

    def _asked_of(self, tensor: Tensor, name: str, frame: FrameType) -> None:
        """Report that the step asks of a tensor of its own making what autograd keeps of it."""
        if is_user(frame) and self.watch.made(tensor):
            self.asked_by(frame, f"Tensor.{name}")

    def asked_by(self, frame: FrameType, operator: str = "torch.is_grad_enabled") -> None:
        """Report that the step asks whether gradients are recorded, in grad mode."""
        at = Site.at(user_line(frame))
        detail = "the step asks whether gradients are recorded: they are, but not in a recording"
        self.watch.trace.found(AutogradInput(detail, operator=operator, site=at), operator)

    def _hand_out(self, func: Any, args: Any) -> None:
        """Take note of a tensor whose address somebody asks for: they may write there."""
        if func in _ADDRESSES and type(args[0]) in _PLAIN:
            with _disable_current_modes():
                self.watch.checksums.hand_out(args[:1])

    def _read_property(self, func: Any, args: Any, frame: FrameType) -> None:
        """Report what the user's own code asks of an argument and no copy of it can answer."""
        if not is_user(frame) or not issubclass(type(args[0]), Tensor):
            return
        of_state = func is _VERSION and not self.watch.made(args[0])  # where a tensor of the step's own lies is checked
        if of_state or self.watch.is_argument(args[0]):
            operator = f"Tensor.{OF_THE_OBJECT[func]}"
            detail = "it is asked of an argument, has another answer at each call, and a replay would know only the recorded one"
            self.watch.trace.found(UnsupportedArgument(detail, operator=operator, site=Site.at(user_line(frame)), remedy=_ASKED))
        elif not self.watch.made(args[0]) and has_storage(args[0]):
            self.watch.trace.placed.append(args[0])

    def _convert(self, func: Any, args: Any, kwargs: Any) -> Any:
        watch, operator = self.watch, f"Tensor.{TO_HOST[func]}"
        frame, index = user_line(sys._getframe(2)), len(watch.trace.operations)
        watch.trace.found(HostSync(f"{operator}() copies a tensor to the host", operator=operator, site=Site.at(frame)))
        if TO_HOST[func] in _LENDS and not watch.made(args[0]) and args[0].device.type == "cpu" and has_storage(args[0]):
            with _disable_current_modes():  # what is looked at here is not done by the step
                watch.trace.lent.save(args[0])
        watch.converting = True
        try:
            with watch.awake:
                result = func(*args, **kwargs)
        finally:
            watch.converting = False
        watch.read(
            operator,
            frame,
            result.tolist() if operator == "Tensor.numpy" else result if operator == "Tensor.tolist" else None,
            index,
        )
        return result

    def _read_elements(self, func: Any, args: Any, kwargs: Any) -> None:
        """Report tensors in a list that becomes a tensor: they are read below the dispatcher."""
        data = [*args, *kwargs.values()]
        elements = [tensor for value in data if not isinstance(value, Tensor) for tensor in tensors_in(value)]
        if not elements:
            return
        watch, operator = self.watch, f"torch.{func.__name__}"
        frame, index = user_line(sys._getframe(2)), len(watch.trace.operations)
        watch.trace.found(HostSync("the elements of the new tensor are read by the host", operator=operator, site=Site.at(frame)))
        watch.function.append(func)
        with _disable_current_modes():
            for tensor in elements:
                watch.read(operator, frame, tensor.tolist(), index)
        watch.function.pop()


def _asking(frame: FrameType) -> FrameType:
    """The frame that calls a function of torch's; one that is written in Python hands the call over in a frame of its own."""
    method = frame.f_back if frame.f_code is torch.overrides.handle_torch_function.__code__ else None
    return (method.f_back if method is not None else None) or frame
