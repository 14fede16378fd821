"""Whether the coordinator is alive and ready, for probes."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from coordinator.web.facts import FactReader
from profiles.errors import SketchfleetError

log = logging.getLogger("sketchfleet.coordinator")


@dataclass(frozen=True)
class Health:
    """live: this process answers. database: so does the database, and it holds the run."""

    live: bool
    database: bool

    @property
    def ready(self) -> bool:
        """Whether all is well."""
        return self.live and self.database

    def plain(self) -> dict[str, Any]:
        """JSON values; nothing about the run, since nobody is asked for a token here."""
        return {"status": "ok" if self.ready else "unavailable", **asdict(self)}


def health(read: FactReader) -> Health:
    """Asks the database."""
    try:
        read.check()
    except (SQLAlchemyError, SketchfleetError) as error:
        log.error("health check: the database does not answer: %s", error)
        return Health(live=True, database=False)
    return Health(live=True, database=True)
