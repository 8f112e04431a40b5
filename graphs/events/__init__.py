"""What happens to captured steps, as it happens: events for callbacks, lines of the ``graphs`` logger, ranges for profilers."""

from graphs.events.kinds import Event, Evicted, Moved, Recorded, Refused, Replayed
from graphs.events.listeners import Subscription, emit, on_event

__all__ = ["Event", "Evicted", "Moved", "Recorded", "Refused", "Replayed", "Subscription", "emit", "on_event"]
