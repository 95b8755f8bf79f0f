"""A source that runs in a thread of its own, and whoever takes in what it delivers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Self

from miniproxy.model import Batch
from miniproxy.sources import Source

PATIENCE_SECONDS = 60.0  # how long to wait for what must come; nothing is asserted about the time it takes


class Running:
    """A subclass says what taking in a batch is."""

    def __init__(self, source: Source) -> None:
        self.batches: list[Batch] = []
        self._queue: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=source.run, args=(self._queue.put, self._stop), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()

    def take(self, batch: Batch) -> None:
        raise NotImplementedError

    def until(self, condition: Callable[[], object]) -> None:
        """Take in batches until the condition holds, which others may bring about too."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            try:
                batch = self._queue.get(timeout=0.02)
            except queue.Empty:
                assert time.monotonic() < end, f"never came true; {self}"
                continue
            self.batches.append(batch)
            self.take(batch)
