"""What the pages say of a run, as values: no HTTP."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.web import words
from coordinator.web.pages.compression import compression_view
from coordinator.web.pages.device import device_view
from coordinator.web.pages.fairness import fairness_view, summaries
from coordinator.web.pages.fleet import fleet_view
from coordinator.web.pages.parts import run_head
from coordinator.web.pages.rounds import round_view, rounds_view
from coordinator.web.pages.screening import screening_view
from coordinator.web.pages.standing import standings


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def row_of(table, name):
    return next(row for row in table.rows if row[0].text == name)


def test_each_device_is_shown_in_the_state_it_is_in(make_run):
    found = {s.device_id: (s.state, s.note) for s in standings(make_run().read())}
    assert found["workstation"] == ("done", "round 6")
    assert found["laptop"] == ("training", "step 12 of 20")
    assert found["field-board"] == ("paused", "its owner is using it")
    assert found["lab-board"] == ("failed", "out of memory")
    assert found["newcomer"][0] == "left out" and "1.9 GB" in found["newcomer"][1]
    assert found["gone"][0] == "away"


def test_gaps_are_to_the_mean_of_the_newest_losses_and_sum_to_nothing(make_run):
    found = [s for s in standings(make_run().read()) if s.gap is not None]
    assert len(found) == 6
    assert sum(s.gap for s in found) == pytest.approx(0, abs=1e-12)
    hardest = max(found, key=lambda s: s.gap)
    assert hardest.device_id == "field-board"


def test_facts_that_are_missing_are_dashes_never_zero(make_run):
    row = row_of(fleet_view(make_run().read()).devices, "newcomer")
    assert [cell.text for cell in row[2:7]] == [words.UNKNOWN] * 5


def test_the_head_tells_the_round_and_its_deadline(make_run):
    head = run_head(make_run().read())
    assert (head.phase, head.merged, head.wanted) == ("open", 6, 10)
    assert "1 of 6 devices done, 1 failed" in head.sentence and "closes in 35 s" in head.sentence
    assert head.elapsed_s == pytest.approx(25)


def test_a_run_that_nobody_serves_is_shown_from_the_database_alone(make_run):
    facts = replace(make_run().read(), live=None)
    assert run_head(facts).phase == "stored"
    assert {s.state for s in standings(facts)} == {"idle"}
    fleet_view(facts)


def test_a_run_without_a_round_has_every_page_and_says_that_there_is_nothing(make_run):
    run = make_run(rounds=0, open_round=False, fleet=())
    facts = run.read()
    assert not rounds_view(facts).rounds.rows
    assert all("nothing measured yet" in c.svg for c in fleet_view(facts).charts)
    assert "nothing can be said" in compression_view(facts).statements[0]
    assert not fairness_view(facts).history.rows and not screening_view(facts).log.rows
    assert round_view(facts, 0) is None and device_view(facts, "nobody") is None
    assert device_view(facts, "newcomer").profile == ()


def test_reasons_stand_beside_each_assignment(make_run):
    view = device_view(make_run().read(), "laptop")
    assert all("its link sends that much" in row[-1] for row in texts(view.rounds))
    assert texts(view.rounds)[0][3] == "under way"


def test_the_screening_log_tells_what_did_not_enter_the_model_and_why(make_run):
    log = [tuple(row) for row in texts(screening_view(make_run().read()).log)]
    assert ("4", "laptop", "update refused", "layer 3 of the update holds a NaN") in log
    failed = next(row for row in log if row[2] == "device failed" and row[0] == "2")
    assert failed[1] == "lab-board" and "CUDA out of memory" in failed[3]
    assert sum(row[2] == "nothing heard" for row in log) == 2
    assert [int(row[0]) for row in log] == sorted((int(row[0]) for row in log), reverse=True)


def test_a_round_shows_its_devices_and_the_components_that_nobody_trained(make_run):
    view = round_view(make_run().read(), 5)
    assert len(view.devices.rows) == 6
    assert view.charts[0].note == "2 of 32 components were trained by nobody."
    assert view.layers.rows[0][1].text == "0.120"
    assert (view.before, view.after) == (4, 6)


def test_fairness_over_time_is_of_the_devices_that_measured_each_adapter(make_run):
    facts = make_run().read()
    found = summaries(facts)
    assert [s.devices for s in found.values()] == [6, 5, 5, 5, 6, 6]
    last = {d: r.loss_received for d, r in facts.measured[5].items()}
    assert found[5].mean == pytest.approx(sum(last.values()) / 6)
    assert found[5].worst_decile_mean == pytest.approx(max(last.values()))


def test_an_overdue_round_is_an_alert(make_run):
    run = make_run()
    facts = run.read()
    assert not fleet_view(facts).notices
    late = replace(facts, at=facts.at + 100)
    assert "past its deadline" in fleet_view(late).notices[0].text
    assert "past its deadline" in run_head(late).sentence


def test_an_alert_of_a_device_leads_to_it_and_stands_on_its_page(make_run):
    run = make_run(rounds=13)
    facts = run.read()
    drifting = [
        replace(row, loss_received=1.0 + (0.2 * row.round if row.device_id == "laptop"
                                          else -0.1 * row.round), nats=(), tokens=())
        for row in facts.rows if row.loss_received is not None
    ]  # fmt: skip
    facts = replace(facts, rows=tuple(drifting))
    notice = next(n for n in fleet_view(facts).notices if n.href == "/devices/laptop")
    assert "laptop" in notice.text
    assert notice in device_view(facts, "laptop").notices
    assert not device_view(facts, "workstation").notices
    assert row_of(fleet_view(facts).devices, "laptop")[0].note == "see alerts"


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (words.size(None), "–"), (words.size(999), "999 B"), (words.size(999_600), "1.00 MB"),
        (words.size(12_345_678), "12.3 MB"), (words.duration(3.14), "3.1 s"),
        (words.duration(119.6), "2 min 00 s"), (words.duration(7300), "2 h 01 min"),
        (words.signed(-0.5), "−0.500"), (words.percent(0.123, 1), "12.3 %"),
        (words.device_link("a/b?c"), "/devices/a%2Fb%3Fc"), (words.relative(2e-5), "2.0e−05"),
        (words.ago(59), "50 s ago"),
    ],
)  # fmt: skip
def test_values_are_told_in_units_a_person_reads(found, told):
    assert found == told
