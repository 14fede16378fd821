"""Links that are known by name, for planning before a link was measured.

Facts from `profiles/links/*.toml`: steady figures of what such links are usually like, not
recordings of one. Emulates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import Field

from profiles.catalogue import Source, read_folder
from profiles.link import LinkProfile


@dataclass(frozen=True)
class KnownLink:
    """One kind of link, as a gRPC channel over it would be timed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    title: str
    up_bps: Annotated[float, Field(gt=0)]  # bits per second
    down_bps: Annotated[float, Field(gt=0)]
    rtt_s: Annotated[float, Field(gt=0)]
    variation: Annotated[float, Field(ge=0, lt=1)]  # mean relative error of the rates
    loss: Annotated[float, Field(ge=0, lt=1)]  # share of packets
    metered: bool
    sources: tuple[Source, ...]

    def profile(self) -> LinkProfile:
        """The link as the planner would see it."""
        return LinkProfile(
            up_bps=self.up_bps,
            down_bps=self.down_bps,
            rtt_s=self.rtt_s,
            metered=self.metered,
            variation=self.variation,
        )


@cache
def _links() -> dict[str, KnownLink]:
    return read_folder("links", KnownLink)


def load_links() -> dict[str, KnownLink]:
    """Every link of the catalogue by its name. Raises `CatalogueError` on a broken file."""
    return dict(_links())
