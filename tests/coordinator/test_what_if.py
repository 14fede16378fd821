"""Plans for fleets that do not exist yet: what is asked for, what adds up, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.config import RunConfig
from coordinator.methods import METHODS
from coordinator.what_if import WhatIf, WhatIfError, what_if
from coordinator.what_if_fleet import FleetError, Group, parse_fleet, read_fleet
from coordinator.what_if_report import (
    allowance_lines,
    budget_table,
    left_out_lines,
    plain,
)
from profiles.catalogue import CatalogueError
from profiles.models import load_models

MIXED = "2 orin-nano-8gb on lte, 1 rtx-4090 on fibre, 3 raspberry-pi-5-4gb on home-dsl"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
}


def config(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "x"}, "model": {"base": "b"}, **sections})


def planned(
    groups: tuple[Group, ...] | str = MIXED, model: str = "qwen2.5-coder-0.5b", **sections: Any
) -> WhatIf:
    fleet = parse_fleet(groups) if isinstance(groups, str) else groups
    return what_if(model, load_models()[model].shape, config(**sections), fleet)


def fleet_file(folder: Path, text: str) -> Path:
    path = folder / "fleet.toml"
    path.write_text(text)
    return path


# --- fleets -------------------------------------------------------------------------------------


def test_words_and_file_say_the_same(tmp_path: Path) -> None:
    path = fleet_file(
        tmp_path,
        '[[group]]\ncount = 12\nboard = "orin-nano-8gb"\nlink = "lte"\n'
        '[[group]]\ncount = 4\nboard = "rtx-4090"\nlink = "fibre"\n',
    )
    assert read_fleet(path) == parse_fleet("12 orin-nano-8gb on lte, 4x RTX-4090 on fibre,")
    first, second = read_fleet(path)
    assert (first.name, first.count, second.name) == ("orin-nano-8gb", 12, "rtx-4090")
    assert first.device_ids[0] == "orin-nano-8gb-01" and len(set(first.device_ids)) == 12


def test_what_a_group_overrides_counts(tmp_path: Path) -> None:
    path = fleet_file(
        tmp_path,
        '[[group]]\nname = "field"\ncount = 1\nboard = "orin-nano-8gb"\nlink = "lte"\n'
        'memory_mb = 3000\nup_bps = 5e5\nrtt_s = 0.3\ndaily_mb = 250\npower_mode = "7W"\n',
    )
    (group,) = read_fleet(path)
    link, power = group.profile.link, group.profile.power
    assert link is not None and power is not None
    assert group.device_ids == ("field",)
    assert group.profile.trainer_bytes == 3_000_000_000
    assert (link.up_bps, link.down_bps, link.rtt_s) == (5e5, group.link.down_bps, 0.3)
    assert link.budget_bytes == 250_000_000 and link.metered
    assert power.mode == "7W"


def test_the_same_board_on_two_links_makes_two_groups() -> None:
    first, second = parse_fleet("1 rtx-4060 on lte, 1 rtx-4060 on fibre")
    assert set(first.device_ids).isdisjoint(second.device_ids)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("12 orin-nano on lte", "no board 'orin-nano'; did you mean orin-nano-8gb"),
        ("12 orin-nano-8gb on lte5", "no link 'lte5'; did you mean lte"),
        ("0 orin-nano-8gb on lte", "a count of 0 orin-nano-8gb cannot be"),
        ("some orin-nano-8gb on lte", "'some orin-nano-8gb on lte' is not of the form"),
        ("12 orin-nano-8gb", "'12 orin-nano-8gb' is not of the form"),
        ("9999 rtx-4090 on fibre", "has 9,999 devices, and at most 2,000"),
        (" , ", "names no devices"),
    ],
)
def test_words_that_make_no_fleet_are_explained(words: str, sentence: str) -> None:
    with pytest.raises((FleetError, CatalogueError), match=sentence):
        parse_fleet(words)


GROUP = '[[group]]\ncount = 1\nboard = "rtx-4090"\nlink = "lte"\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"\[group\] is missing"),
        ("group = []", "names no devices"),
        ("[[group]", "is not valid TOML"),
        (GROUP + "conut = 1", r"unknown key 'conut' in \[\[group\]\] 1; did you mean 'count'"),
        (GROUP + GROUP.replace("link", "lnik"), r"'lnik' in \[\[group\]\] 2; did you mean 'link'"),
        (GROUP.replace('link = "lte"\n', ""), r"\[\[group\]\] 1 lacks 'link'"),
        (GROUP.replace("1", "-3"), "a count of -3 rtx-4090 cannot be"),
        (GROUP.replace("1", "1.5"), r"\[\[group\]\] 1 count: Input should be a valid integer"),
        (GROUP + "memory_mb = 1", r"\[\[group\]\] 1 memory_mb: Input should be greater"),
        (GROUP + "up_bps = 0", r"\[\[group\]\] 1 up_bps: Input should be greater than 0"),
        (GROUP + 'power_mode = "MAXN"', "rtx-4090 has no power mode 'MAXN'; there are default"),
        ((GROUP + 'name = "a"\n') * 2, "two groups named 'a'"),
        ("[group]\ncount = 1\n", r"\[group\]"),
    ],
)
def test_a_file_that_makes_no_fleet_is_explained(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises((FleetError, CatalogueError), match=sentence) as raised:
        read_fleet(fleet_file(tmp_path, text))
    assert "\n" not in str(raised.value)


# --- plans --------------------------------------------------------------------------------------


def test_every_device_of_a_group_is_planned_for_and_fits() -> None:
    found = planned()
    assert [len(g.plans) for g in found.groups] == [2, 1, 3] and found.devices == 6
    for group in found.groups:
        for plan in group.plans:
            assert plan.predicted_peak_bytes <= group.budget_bytes
            assert plan.predicted.total_s <= found.round_s * 1.001
    assert found.busy_s == max(15.0, *(p.predicted.total_s for g in found.groups for p in g.plans))
    assert found.coverage == sum(p.rank for g in found.groups for p in g.plans) / 32


def test_a_day_is_made_of_rounds_and_each_moves_what_is_planned() -> None:
    found = planned(evaluation={"every_rounds": 4})
    assert found.measuring_s is not None and found.measuring_s >= found.busy_s
    four_rounds_s = 3 * found.busy_s + found.measuring_s
    assert found.rounds_a_day == pytest.approx(4 * 86_400 / four_rounds_s)
    for group in found.groups:
        assert group.plan is not None
        usual = group.plan.predicted
        assert group.a_day.up_bytes == pytest.approx(found.rounds_a_day * usual.up_bytes, rel=0.3)
        # One round in four also fetches the whole adapter, unless that is the very slice.
        assert group.a_day.down_bytes >= 0.999 * found.rounds_a_day * usual.down_bytes
    assert found.a_day.up_bytes == pytest.approx(
        sum(g.a_day.up_bytes * g.group.count for g in found.groups)
    )


def test_a_run_that_measures_every_round_moves_the_whole_adapter_every_round() -> None:
    often, seldom = (planned(evaluation={"every_rounds": n}) for n in (1, 50))
    assert often.rounds_a_day <= seldom.rounds_a_day
    each = [f.a_day.down_bytes / f.rounds_a_day for f in (often, seldom)]
    assert each[0] > 1.5 * each[1]


def test_slower_links_carry_less_and_larger_boards_keep_more_precision() -> None:
    fast, slow = planned("1 rtx-4090 on fibre"), planned("1 rtx-4090 on rural-dsl")
    plans = [f.groups[0].plan for f in (fast, slow)]
    assert plans[0] and plans[1]
    assert plans[1].predicted.push_s > 20 * plans[0].predicted.push_s
    auto = {"training": {"precision": "auto"}}
    small = planned("1 orin-nano-8gb on lte", "qwen2.5-coder-3b", **auto).groups[0].plan
    large = planned("1 agx-orin-64gb on lte", "qwen2.5-coder-3b", **auto).groups[0].plan
    assert small and large and small.precision != large.precision == "bf16"


def test_boards_that_cannot_train_or_hold_the_model_are_left_out_with_the_reason() -> None:
    fleet = "1 jetson-nano on lte, 12 orin-nano-8gb on lte, 1 rtx-4090 on fibre"
    found = planned(fleet, "qwen2.5-coder-7b")
    assert found.devices == 1
    nano, orin, card = found.groups
    assert nano.is_unfit and orin.is_unfit and not card.is_unfit
    assert (nano.missing, orin.missing, card.missing) == (1, 12, 0)
    lines = left_out_lines(found)
    assert len(lines) == 2  # twelve alike are told once
    assert "Python 3.6" in lines[0]
    assert lines[1].startswith("12 of 12 orin-nano-8gb: orin-nano-8gb does not fit: needs 8.")


def test_a_fleet_of_which_none_can_take_part_is_a_plan_without_devices() -> None:
    found = planned("2 raspberry-pi-5-4gb on lte", "qwen2.5-coder-7b")
    assert found.devices == 0 and found.groups[0].plan is None
    assert found.a_day.up_bytes == 0 and found.coverage == 0


def test_what_owners_allow_a_day_is_compared_with_what_would_move() -> None:
    found = planned("1 rtx-4090 on fibre")
    (only,) = found.groups

    def allowing(budget_bytes: int | None) -> WhatIf:
        assert only.group.profile.link is not None
        link = replace(only.group.profile.link, budget_bytes=budget_bytes)
        group = replace(only.group, profile=replace(only.group.profile, link=link))
        return replace(found, groups=(replace(only, group=group),))

    moved = int(only.a_day.up_bytes + only.a_day.down_bytes)
    assert allowance_lines(allowing(None)) == allowance_lines(allowing(moved + 1)) == []
    assert "more than the 2 GB that the owner allows" in allowance_lines(allowing(2 * 10**9))[0]


@pytest.mark.parametrize(
    "method", ["fslora", "fedit", "flora", "fedex-lora", "fed-sb", "rolora", "flasc", "fed-plora"]
)
def test_methods_are_planned_with_what_they_move(method: str) -> None:
    found = planned("4 rtx-4090 on fibre", method={"name": method})
    assert found.devices == 4 and found.a_day.up_bytes > 0


def test_a_byte_budget_is_planned_with_and_shown() -> None:
    wire = {"update": "auto", "error_feedback": True}
    found = planned(plan={"bytes_per_round": 500_000}, wire=wire)
    rows = budget_table(found)
    assert len(rows) == sum(g.plan is not None for g in found.groups)
    for row, plan in zip(rows, [g.plan for g in found.groups if g.plan], strict=True):
        assert row[1] == f"{plan.budget.size_bytes / 1e3:,.1f}"
        assert plan.predicted.up_bytes <= 500_000
        assert row[-1] == f"{plan.expected_error:.2f}"
    assert budget_table(planned()) == []


def test_a_days_bytes_suffice_for_the_days_rounds() -> None:
    wire = {"update": "auto", "error_feedback": True}
    found = planned(run={"name": "x", "rounds": 100_000}, plan={"bytes_per_day": 20_000_000},
                    wire=wire)  # fmt: skip
    for g in found.groups:
        if g.plan is not None:
            assert 5_000_000 <= g.a_day.up_bytes <= 25_000_000


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_planned_under_a_budget(method: str) -> None:
    found = planned("1 orin-nano-8gb on fibre", "smollm2-135m", method={"name": method},
                    plan={"bytes_per_round": 3_000_000}, wire={"update": "auto"})  # fmt: skip
    plan = found.groups[0].plan
    assert plan is not None and plan.update is not None
    assert plan.predicted.up_bytes <= plan.budget.size_bytes <= 3_000_000
    assert 0 <= plan.expected_error < 1
    assert (plan.update.density < 1) == (method == "flasc")


def test_tensors_trained_whole_need_the_weights() -> None:
    run = config(model={"base": "b", "modules_to_save": ["lm_head"]})
    with pytest.raises(WhatIfError, match=r"modules_to_save .* leave it out"):
        what_if("x", load_models()["smollm2-135m"].shape, run, parse_fleet(MIXED))


def test_plain_values_are_json_and_hold_every_plan() -> None:
    found = planned()
    back = json.loads(json.dumps(plain(found)))
    assert back["devices"] == 6 and [g["takes_part"] for g in back["groups"]] == [2, 1, 3]
    assert back["groups"][0]["plans"][0]["rank"] == found.groups[0].plans[0].rank


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.usefixtures("wide")
def test_the_command_tells_what_each_group_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "qwen2.5-coder-0.5b", "--devices", MIXED]) == 0
    out = capsys.readouterr().out
    for words in (
        "6 of 6 devices take part", "nothing was measured", "2 orin-nano-8gb", "rounds a day",
        "What binds:", "the fleet",
    ):  # fmt: skip
        assert words in out
    assert "Left out" not in out


def test_the_command_reads_fleet_run_and_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
    run = tmp_path / "run.toml"
    run.write_text('[run]\nname = "r"\n[model]\nbase = "base"\n[adapter]\nrank = 6\n')
    fleet = fleet_file(tmp_path, GROUP)
    assert main(["plan", "--run", str(run), "--fleet", str(fleet), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["rank"]) == ("base", 6)
    assert found["groups"][0]["plans"][0]["device_id"] == "rtx-4090"
    assert main(["plan", "--run", str(run), "--model", "smollm2-135m", "--fleet", str(fleet)]) == 0
    assert "smollm2-135m, 135 M parameters" in capsys.readouterr().out


@pytest.mark.usefixtures("wide")
def test_the_command_lists_the_catalogues(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list"]) == 0
    out = capsys.readouterr().out
    for words in ("orin-nano-super-8gb", "cannot train", "satellite-leo", "codellama/CodeLlama-7b"):
        assert words in out
    assert main(["plan", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "orin-nano-super-8gb" in {board["name"] for board in listed["boards"]}
    assert {"satellite-leo"} <= {link["name"] for link in listed["links"]} and listed["models"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no model to plan for; give --model"),
        (["--model", "smollm2-135m"], "no fleet to plan for"),
        (["--model", "smollm2-135", "--devices", MIXED], "did you mean smollm2-135m"),
        (["--model", "smollm2-135m", "--devices", "1 tractor on lte"], "no board 'tractor'"),
        (["--model", "smollm2-135m", "--fleet", "gone.toml"], "gone.toml cannot be read"),
        (["--run", "gone.toml", "--devices", MIXED], "gone.toml cannot be read"),
        (["--model", "qwen2.5-coder-7b", "--devices", "1 raspberry-pi-5-4gb on lte"],
         "no device can take part"),
        (["--model", "smollm2-135m", "--devices", MIXED, "--picture", "gone/x.png"],
         "gone/x.png cannot be written"),
        (["--model", "smollm2-135m", "--devices", MIXED, "--picture", "x.doc"],
         "x.doc cannot be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_sentence_and_a_bad_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments]) == (78 if "--run" in arguments else 1)
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1
    assert said.err.startswith("sketchfleet-coordinator: ")


# --- the picture --------------------------------------------------------------------------------


def test_the_picture_is_drawn_with_and_without_devices_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    fleet = "3 orin-nano-8gb on lte, 1 jetson-nano on lte, 1 rtx-4090 on fibre"
    asked = ["plan", "--model", "qwen2.5-coder-7b", "--devices", fleet, "--picture", str(path)]
    assert main(asked) == 0
    assert path.read_bytes().startswith(b"\x89PNG") and str(path) in capsys.readouterr().out


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    asked = ["plan", "--model", "smollm2-135m", "--devices", MIXED]
    assert main([*asked, "--picture", str(tmp_path / "x.png")]) == 1
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert main(asked) == 0  # only the picture needs it


def test_planning_needs_no_torch() -> None:
    script = (
        "import sys\nfrom coordinator.cli import main\n"
        "main(['plan', '--model', 'smollm2-135m', '--devices', '1 rtx-4090 on lte', '--json'])\n"
        "print(*{'torch', 'transformers', 'grpc', 'sqlalchemy', 'matplotlib'} & set(sys.modules),"
        " file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == []
