"""Where objects come from. A source watches something and hands over what changed, already checked.

It answers for reading, checking and noticing changes; it hands on `Batch`es and knows nothing of kernels or
policies. wire.py does the checking for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import Protocol

from ..model import Batch

Deliver = Callable[[Batch], None]


class Source(Protocol):
    """Anything that can feed the agent."""

    def run(self, deliver: Deliver, stop: Event) -> None:
        """Block until `stop` is set, calling `deliver` from this thread, one Batch at a time.

        What existed at the start ends with a Batch of synced=True; until then the agent must take nothing
        for gone. Trouble with the source itself is a Problem, never an exception.
        """
        ...
