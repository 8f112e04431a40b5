"""Who is told of events: the ``graphs`` logger, and callbacks."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable

from graphs.errors import ConfigError
from graphs.events.kinds import Event
from passes.forked_process import forkable_lock

logger = logging.getLogger("graphs")
logger.addHandler(logging.NullHandler())  # a program that configures no logging is told by warnings alone

Callback = Callable[[Event], object]


class Subscription:
    """A callback that is told of events until `remove` is called. As a context manager, it is removed at the end of the block."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self._failed = False

    def tell(self, event: Event) -> None:
        """Call back. What the callback raises is logged and warned about the first time, and does not reach the step."""
        try:
            self.callback(event)
        except Exception as error:
            if self._failed:
                return
            self._failed = True
            logger.exception(
                "the callback %r raised at an event %r; further exceptions of it are passed over", self.callback, event
            )
            with contextlib.suppress(RuntimeWarning):  # made an error, it would look like an error of the step
                text = f"graphs: a callback of on_event raised {type(error).__name__}: {error}; the traceback is in the log"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def remove(self) -> None:
        """Tell the callback of no further event; a second time, this does nothing."""
        listeners.change(lambda known: tuple(other for other in known if other is not self))

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Listeners:
    """The subscriptions of this process.

    Attributes:
        known: in the order in which they were made.
        at_replays: whether a replay has anybody to tell, the one attribute that a replay asks: there are subscriptions, or a
            step whose ranges were asked for.
    """

    def __init__(self) -> None:
        self.known: tuple[Subscription, ...] = ()
        self.at_replays = False
        self._ranges = False
        self._lock = forkable_lock()

    def change(self, of: Callable[[tuple[Subscription, ...]], tuple[Subscription, ...]]) -> None:
        """Exchange the subscriptions."""
        with self._lock:
            self.known = of(self.known)
            self.at_replays = self._ranges or bool(self.known)

    def want_ranges(self) -> None:
        """Have replays look for ranges that were asked for, from now on."""
        with self._lock:
            self._ranges = self.at_replays = True


listeners = Listeners()


def on_event(callback: Callback) -> Subscription:
    """Call ``callback(event)`` for each event of every captured step of this process; see `graphs.events` for the events.

    The callback runs on the thread of the call that the event belongs to, which waits for it, and in most cases while first
    calls or the step are locked. So it has to be quick, and to call no captured step. An `Exception` that it raises is logged
    with its traceback and warned about, once for each subscription; the step goes on, and the callback is told of later events.

    Returns:
        A handle, whose ``remove()`` ends it. It is a context manager as well.

    Raises:
        ConfigError: ``callback`` cannot be called.
    """
    if not callable(callback):
        raise ConfigError("callback", callback, "a function of one event")
    made = Subscription(callback)
    listeners.change(lambda known: (*known, made))
    return made


def emit(event: Event) -> None:
    """Log an event at its level, and tell everybody who asked for events."""
    level = event.level
    if level and logger.isEnabledFor(level):
        logger.log(level, "%s", event)
    for subscription in listeners.known:
        subscription.tell(event)
