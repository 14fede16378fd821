"""A study goes on where it was stopped, and never mixes two."""

import json

import pytest

from tests.trials.study.made import record
from trials.study.design import runs_of
from trials.study.engine import claim, play_all, read_record, write_record
from trials.study.findings import findings
from trials.study.settings import StudyError, StudySettings, load_study, shipped


def settings(**learning):
    s = load_study(shipped("compression-fairness", True)).model_dump(mode="json")
    s["learning"] |= learning
    return StudySettings.model_validate(s)


def test_shipped_studies_are_whole_and_every_run_has_a_key_of_its_own():
    for name in ("compression-fairness", "methods"):
        for quick in (True, False):
            s = load_study(shipped(name, quick))
            runs = runs_of(s)
            assert len({run.key for run in runs}) == len(runs)
    runs = runs_of(load_study(shipped("compression-fairness", False)))
    assert len({run.seed for run in runs}) >= 5 and len(runs[0].devices) >= 8
    assert {len(set(r.tier.values())) for r in runs if r.kind == "per device"} == {4}


def test_assignments_are_what_they_say():
    s = settings()
    for run in runs_of(s):
        if run.kind == "per device" and run.assignment == "anti-size":
            by_size = sorted(run.devices, key=lambda d: run.sizes[d])
            assert [run.tier[d] for d in by_size] == [0, 0, 1, 1, 2, 2, 3, 3]
        if run.kind == "per device" and run.assignment == "wealth":
            assert [run.tier[d] for d in s.fleet.domains] == [0, 0, 1, 1, 2, 2, 3, 3]
        if run.kind == "per device":
            assert sorted(run.tier.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    by_chance = [r for r in runs_of(s) if r.assignment == "independent"]
    drawn = {tuple(r.tier[d] for d in r.devices) for r in by_chance}
    assert len(drawn) == 2  # another draw for every seed


def test_finished_runs_are_not_played_again(tmp_path):
    s = settings()
    runs = runs_of(s)
    claim(s, tmp_path)
    (tmp_path / "runs").mkdir()
    for run in runs:
        write_record(tmp_path / "runs" / f"{run.key}.json", record(run))
    told = []
    found = play_all(s, runs, tmp_path, 1, told.append)  # would take minutes if it played
    assert told == [f"{len(runs)} runs, {len(runs)} of them found finished in {tmp_path}"]
    assert found[runs[0].key].points[0].nats == record(runs[0]).points[0].nats


def test_a_folder_of_other_settings_is_refused_but_a_new_analysis_is_not(tmp_path):
    claim(settings(), tmp_path)
    claim(settings().model_copy(update={"analysis": {"permutations": 99}}), tmp_path)
    more = settings().design.model_copy(update={"seeds": (1, 2, 3)})
    claim(settings().model_copy(update={"design": more}), tmp_path)  # it may grow
    with pytest.raises(StudyError, match="other settings"):
        claim(settings(rounds=5, measured=[1, 5]), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(StudyError, match="not empty"):
        claim(settings(), tmp_path / "other")


def test_a_changed_run_has_another_key():
    keys = {run.key for run in runs_of(settings())}
    assert not keys & {run.key for run in runs_of(settings(learning_rate=1e-3))}


def test_half_a_record_is_an_error_that_says_what_to_do(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"key": "x"}))
    with pytest.raises(StudyError, match="delete it"):
        read_record(path)


def test_mistakes_in_a_study_are_told():
    plain = settings().model_dump(mode="json")
    plain["design"]["per_device"] = [{"means": "sketch", "method": "fedloar"}]
    with pytest.raises(ValueError, match="no method is called 'fedloar'"):
        StudySettings.model_validate(plain)
    plain = settings().model_dump(mode="json")
    plain["design"]["mitigations"][0]["sections"] = {"fairness": {"weights": "q-ffl", "t": 2.0}}
    with pytest.raises(StudyError, match="t does nothing"):
        runs_of(StudySettings.model_validate(plain))
    with pytest.raises(StudyError, match="give its file"):
        shipped("weather", False)


def test_findings_are_reports_as_they_are(tmp_path):
    (tmp_path / "report.md").write_text("# A study\n\nSaid.\n\n## Part\n")
    (tmp_path / "study.json").write_text('{"study": "methods"}')
    text = findings([tmp_path])
    assert text.startswith("# Findings") and text.endswith("\n\nSaid.\n\n### Part\n")
    assert "\n## A study\n\n`report.md` of `sketchfleet-trial study methods`" in text
    with pytest.raises(StudyError, match="finish its study first"):
        findings([tmp_path / "none"])
