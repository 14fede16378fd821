"""What the studies conclude from records: planted effects are told, and nothing else is."""

import json

import pytest

from coordinator.document import markdown
from coordinator.document_html import html
from tests.trials.study.made import record
from trials.study import compression_report, methods
from trials.study.board import cells_of
from trials.study.command import _plain
from trials.study.compression import PRIMARY, within
from trials.study.design import runs_of
from trials.study.settings import StudySettings

DOMAINS = ["array-stubs", "polynomials", "graph-tests", "object-mapper", "statistics-tests",
           "kernels", "columnar-headers", "tensor-headers"]  # fmt: skip


def settings(study="compression-fairness", **design):
    return StudySettings.model_validate({
        "study": study,
        "fleet": {"domains": DOMAINS, "train_sequences": [8, 16, 24, 32, 48, 64, 96, 128],
                  "participants": 6},
        "learning": {"rank": 16, "alpha": 32, "sequence_tokens": 64, "micro_batch": 2,
                     "local_steps": 2, "learning_rate": 1e-3, "rounds": 8, "measured": [1, 2, 8],
                     "held_out_sequences": 12},
        "design": {"seeds": [1, 2, 3, 4, 5], **design},
        "analysis": {"permutations": 499, "replicates": 200},
    })  # fmt: skip


ARM = {"means": "sketch", "method": "fslora"}
MITIGATION = {"name": "magic", **ARM, "assignment": "wealth"}


def study(effect, **how):
    s = settings(per_device=[ARM], assignments=["independent", "anti-size", "wealth"],
                 everywhere=[ARM], mitigations=[MITIGATION])  # fmt: skip
    runs = runs_of(s)
    return s, cells_of(runs, {r.key: record(r, effect, **how) for r in runs})


def primary(found):
    (w,) = [w for w in found if w.outcome == PRIMARY and w.assignment == "independent"]
    return w


def test_compression_that_hurts_is_found_with_its_size():
    found = within(*study(0.02))
    w = primary(found)
    assert w.adjusted < 0.05 and w.rho.value > 0.5
    assert w.slope.low < 0.02 < w.slope.high and w.slope.low > 0
    assert w.highest == pytest.approx(0.976, abs=1e-3)  # pairs of devices share a level
    assert 0.3 < w.detectable < 0.6  # five runs of eight devices: 2.8 / sqrt(5 * 7)


def test_compression_that_does_nothing_is_not_reported():
    w = primary(within(*study(0.0)))
    assert not (w.adjusted <= 0.05 and w.rho.excludes_zero)


def test_an_effect_of_data_size_alone_is_told_apart_by_the_control():
    """Simpson: big devices are worse off, and are compressed most under "anti-size"."""
    s, cells = study(0.0, shift=lambda run, d: 0.001 * run.sizes[d] * (run.kind != "local"))
    found = {w.assignment: w for w in within(s, cells) if w.outcome == PRIMARY}
    assert found["anti-size"].rho.value > 0.9
    assert abs(found["anti-size"].partial.value) < 0.5
    assert abs(found["independent"].rho.value) < 0.45


def test_a_device_starved_on_purpose_leads_the_tier_gap():
    s, cells = study(
        0.0, shift=lambda run, d: 0.1 * (run.kind == "per device" and run.tier[d] == 3)
    )
    (h,) = [h for h in compression_report.helps(s, cells) if h.name == "magic"]
    assert h.differences["tier gap"].high < -0.08  # what helps undoes the 0.1


def test_the_report_says_what_the_figures_say_and_fits_in_json():
    document, figures = compression_report.conclude(*study(0.02))
    supports = next(x for x in document.sections if x.title == "What this supports")
    cannot = next(x for x in document.sections if x.title == "What this cannot say")
    assert "devices that were compressed more ended worse" in supports.parts[0].items[0]
    first = document.sections[0]
    assert first.title == "The answer"
    assert "Against training alone: shown for sketch, fslora" in first.parts[0].items[0]
    assert any("magic was not shown" in item for item in cannot.parts[0].items)
    text, drawn = markdown(document), html(document)
    assert "ended worse" in text and "<svg" in drawn and " src=" not in drawn
    assert json.loads(json.dumps(_plain(figures), allow_nan=False))["within"]


def test_methods_are_read_within_what_the_first_one_spends():
    s = settings("methods", methods=["fslora", "fedit"])
    runs = runs_of(s)
    better = lambda run, d: -0.05 * (run.method == "fedit")  # noqa: E731
    cells = cells_of(runs, {r.key: record(r, shift=better) for r in runs})
    document, figures = methods.conclude(s, cells)
    said = {(x["method"], x["budget"]): x for x in figures["standings"]}
    assert said["fedit", "rounds"]["rounds"] == 8
    assert said["fedit", "bytes"]["rounds"] < 8  # sends more a round than sketches
    assert said["fslora", "bytes"]["spent"] == pytest.approx(1)
    assert said["fedit", "rounds"]["against"]["value"] == pytest.approx(-0.05, abs=0.01)
    first, supports = document.sections[:2]
    assert "fedit has a lower mean loss" in supports.parts[0].items[0]
    assert "lower one was shown for fedit; a higher one for none" in first.parts[0].items[0]
    worse = lambda run, d: 0.05 * (run.method == "fedit")  # noqa: E731
    cells = cells_of(runs, {r.key: record(r, shift=worse) for r in runs})
    assert "fedit has a higher" in methods.conclude(s, cells)[0].sections[1].parts[0].items[0]
    other = settings("methods", methods=["fedit", "fslora"])
    cells = cells_of(runs_of(other), {r.key: record(r) for r in runs})
    read = {(x["method"], x["budget"]): x for x in methods.conclude(other, cells)[1]["standings"]}
    frugal = read["fslora", "bytes"]  # at its end, and it is told
    assert frugal["rounds"] == 8 and frugal["spent"] < 0.9
