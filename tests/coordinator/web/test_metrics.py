"""/metrics: names, units, bounds; and that what is deployed beside it asks for what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.alerts import Alert
from coordinator.web.facts import Facts
from coordinator.web.metrics import MOST_DEVICES, OTHER, Exporter
from coordinator.web.pages.standing import standings

DEPLOY = Path(__file__).parents[3] / "deploy"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian: apt install prometheus)",
)
FUNCTIONS = {"sum", "rate", "increase", "time", "label_values"}


def scrape(read, folder=None):
    families = text_string_to_metric_families(Exporter(read, folder).text().decode())
    return {family.name: family for family in families}


def value(families, name, **labels):
    found = [s.value for f in families.values() for s in f.samples
             if s.name == name and labels.items() <= s.labels.items()]  # fmt: skip
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_metrics_say_what_the_pages_say(make_run):
    run = make_run()
    found = scrape(run.read, run.folder)
    assert value(found, "sketchfleet_round") == 6
    assert value(found, "sketchfleet_rounds_merged_total") == 6
    assert value(found, "sketchfleet_round_phase", phase="open") == 1
    assert value(found, "sketchfleet_devices", state="enrolled") == 8
    assert value(found, "sketchfleet_assignments_total", outcome="failed") == 1
    laptop = next(s for s in standings(run.read()) if s.device_id == "laptop")
    labels = {"device": "laptop"}
    assert value(found, "sketchfleet_device_loss_nats", **labels) == laptop.loss
    assert value(found, "sketchfleet_device_update_bytes_total", **labels) == laptop.up_bytes
    assert value(found, "sketchfleet_merge_seconds_count") == 6
    assert value(found, "sketchfleet_components_untrained") == 2
    assert value(found, "sketchfleet_state_disk_free_bytes") > 0


def test_alerts_are_counted_by_kind(make_run):
    facts = make_run().read()
    vars(facts)["alerts"] = (Alert("tier_starved", "pi-5", "starved", 3, "warning"),) * 2
    found = scrape(lambda: facts)
    assert value(found, "sketchfleet_alerts", kind="tier_starved") == 2
    assert value(found, "sketchfleet_alerts", kind="component_cold") == 0


def test_names_follow_the_conventions(make_run):
    run = make_run()
    for family in scrape(run.read, run.folder).values():
        if family.name.startswith(("process_", "python_")):
            continue
        assert re.fullmatch(r"sketchfleet_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert not re.search(r"_(ms|mb|kb|percent|minutes)(_|$)", family.name)
        counts = {s.name for s in family.samples if s.name.endswith("_total")}
        assert bool(counts) == (family.type == "counter"), family.name


def test_the_number_of_series_is_bounded_and_the_rest_is_one_device(make_run):
    count = MOST_DEVICES + 7
    fleet = tuple((f"edge-{i:03d}", f"board {i}", "", 8, 1.0, "c", 2.0) for i in range(count))
    run = make_run(fleet=fleet, rounds=1, open_round=False)
    found = scrape(run.read)
    names = {s.labels["device"] for s in found["sketchfleet_device_update_bytes"].samples}
    assert len(names) == MOST_DEVICES + 1 and OTHER in names and "edge-000" in names
    total = sum(s.value for s in found["sketchfleet_device_update_bytes"].samples)
    assert total == sum(r.up_bytes for r in run.read().rows)
    gaps = [s.value for s in found["sketchfleet_device_loss_gap_nats"].samples
            if s.labels["device"] == OTHER]  # fmt: skip
    assert len(gaps) == 1
    assert len(found["sketchfleet_tier_loss_nats"].samples) <= 21
    assert sum(len(f.samples) for f in found.values()) < 8 * (MOST_DEVICES + 1) + 120


def test_names_of_devices_are_escaped(make_run, hostile_fleet):
    run = make_run(fleet=(*hostile_fleet, ('new\nline"\\', "b", "", 8, 1.0, "c", 2.0)),
                   rounds=1, open_round=False)  # fmt: skip
    devices = {s.labels["device"] for s in scrape(run.read)["sketchfleet_device_loss_nats"].samples}
    assert 'new\nline"\\' in devices and hostile_fleet[0][0] in devices


def metric_names(expression):
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', "", expression)
    return set(re.findall(r"[a-z_]{2,}", bare)) - FUNCTIONS


def exported(run):
    facts: Facts = run.read()
    return Exporter(lambda: facts, run.folder).names() | {"up"}


def test_every_query_of_the_grafana_dashboard_names_an_existing_metric(make_run):
    board = json.loads((DEPLOY / "grafana" / "sketchfleet.json").read_text())
    known = exported(make_run())
    queries = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    assert len(queries) > 20
    for query in queries:
        assert metric_names(query) and metric_names(query) <= known, query
    for variable in board["templating"]["list"]:
        assert set(re.findall(r"sketchfleet_\w+", json.dumps(variable["query"]))) <= known
    assert board["id"] is None and len({p["id"] for p in board["panels"]}) == len(board["panels"])


@needs_promtool
def test_every_query_of_the_grafana_dashboard_is_one_to_prometheus(tmp_path):
    board = json.loads((DEPLOY / "grafana" / "sketchfleet.json").read_text())
    queries = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    plain = [q.replace("$__rate_interval", "5m").replace("$__range", "1h") for q in queries]
    rules = [{"record": f"q:{n}", "expr": re.sub(r"\$\w+", "x", q)} for n, q in enumerate(plain)]
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "q", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(tmp_path / "rules.json")],
                          check=False, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_part_of_the_grafana_dashboard_asks_the_data_source_that_is_chosen():
    text = (DEPLOY / "grafana" / "sketchfleet.json").read_text()
    board = json.loads(text)
    chosen = board["templating"]["list"][0]
    assert chosen["type"] == "datasource" and chosen["name"] == "datasource"
    assert set(re.findall(r'"uid": "(\$[^"]*)"', text)) == {"${datasource}"}
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in board["panels"])


def test_every_alert_rule_names_an_existing_metric_and_kind(make_run):
    text = (DEPLOY / "prometheus" / "sketchfleet.rules.yml").read_text()
    run = make_run()
    assert set(re.findall(r"sketchfleet_\w+", text)) <= exported(run)
    kinds = {s.labels["kind"] for s in scrape(run.read)["sketchfleet_alerts"].samples}
    assert set(re.findall(r'kind="(\w+)"', text)) <= kinds


def test_the_documentation_names_what_there_is_and_all_of_it(make_run):
    run = make_run()
    table = (DEPLOY.parent / "docs" / "dashboard.md").read_text().partition("| metric |")[2]
    told = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.M))))
    known = {re.sub(r"^sketchfleet_|_(sum|count)$", "", name) for name in exported(run)
             if name.startswith("sketchfleet_")}  # fmt: skip
    assert told - {"_sum", "_count"} == known


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "sketchfleet.rules.yml"), ("check", "config", "prometheus.yml"),
     ("check", "config", "--syntax-only", "compose.yml"),
     ("test", "rules", "sketchfleet.tests.yml")],
)  # fmt: skip
def test_promtool_accepts_what_is_deployed(arguments):
    done = subprocess.run(["promtool", *arguments], cwd=DEPLOY / "prometheus", check=False,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_metrics(make_run):
    run = make_run()
    done = subprocess.run(["promtool", "check", "metrics"], check=False, capture_output=True,
                          input=Exporter(run.read, run.folder).text(), timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
