"""Every link file is plausible and becomes a link the planner can use."""

from __future__ import annotations

import pytest

from profiles.links import load_links

LINKS = load_links()
NAMES = {
    "fibre", "ethernet-lab", "home-dsl", "rural-dsl", "lte", "lte-poor", "3g", "wifi-shared",
    "satellite-geo", "satellite-leo",
}  # fmt: skip


def test_the_catalogue_holds_the_links_that_runs_are_planned_for() -> None:
    assert set(LINKS) >= NAMES


@pytest.mark.parametrize("name", LINKS)
def test_figures_are_of_the_size_that_links_have(name: str) -> None:
    link = LINKS[name]
    assert 1e5 <= link.up_bps <= link.down_bps <= 1e10
    assert 1e-4 <= link.rtt_s <= 1
    assert 0 <= link.loss <= 0.05 and 0 < link.variation <= 0.6
    found = link.profile()
    assert (found.up_bps, found.down_bps, found.rtt_s) == (link.up_bps, link.down_bps, link.rtt_s)
    assert found.metered == link.metered and found.budget_bytes is None


def test_no_figure_claims_to_be_measured() -> None:
    assert {source.status for link in LINKS.values() for source in link.sources} == {"assumed"}


def test_worse_links_of_a_kind_are_worse() -> None:
    for good, bad in (("lte", "lte-poor"), ("home-dsl", "rural-dsl"), ("lte-poor", "3g")):
        assert LINKS[good].up_bps > LINKS[bad].up_bps and LINKS[good].rtt_s < LINKS[bad].rtt_s
    assert LINKS["satellite-geo"].rtt_s > 10 * LINKS["satellite-leo"].rtt_s
