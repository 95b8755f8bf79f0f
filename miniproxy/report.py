"""What `run` says in its log while all goes well: one line for each family and sync that wrote something."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .log import fields
from .observer import Observer, Synced, Trigger

log = logging.getLogger(__name__)


class SyncLog(Observer):
    def synced(self, results: Sequence[Synced], triggers: Sequence[Trigger], seconds: float, taken: int) -> None:
        for family, result, _, took, _ in results:
            if result and result.transactions:
                said = fields(
                    family=family,
                    operations=result.operations,
                    transactions=len(result.transactions),
                    seconds=round(took, 4),
                )
                log.info("synced", extra=said)
