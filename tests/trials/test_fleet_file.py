"""fleet.toml says what is tried; a mistake in it is told in one sentence before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles.errors import SketchfleetError
from trials.fleet_file import FleetFileError, read_trial

RUN = '[run.model]\nbase = "base"\n'
DEVICE = '[[device]]\nname = "ash"\ndata = { include = ["code"] }\n'
SHIPPED = Path(__file__).resolve().parent.parent.parent / "trials" / "fleets"


@pytest.fixture
def written(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("pass\n")

    def write(text, name="fleet.toml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_fleet_is_read_as_written(written):
    trial = read_trial(written(RUN + """
[run.training]
local_steps = 3

[trial]
at_most_s = 60

[[device]]
name = "field"
count = 3
board = "orin-nano-8gb"
link = "lte-poor"
loss = 0.05
data = { include = ["code"], languages = ["python"] }
agent = { policy = { owner = "dedicated" } }

[[device]]
name = "desk"
up_bps = 1e6
down_bps = 2e6
rtt_s = 0.3
outage = { every_s = 60, lasts_s = 20, begun_s = 5 }
memory_mb = 900
cpus = 0.5
data = { include = ["code"] }
"""))  # fmt: skip
    assert [d.name for d in trial.devices] == ["field-1", "field-2", "field-3", "desk"]
    field, desk = trial.devices[0], trial.devices[-1]
    assert field.link.at(0).up_bps == 1e6 and field.link.at(0).loss == 0.05
    assert 6e9 < field.memory_bytes < 8 * 2**30 and field.board.name == "orin-nano-8gb"
    assert field.agent["policy"] == {"owner": "dedicated"}
    assert Path(field.agent["data"]["include"][0]).is_absolute()
    assert desk.link.at(30).up_bps == 1e6 and desk.link.at(36).up_bps == 0
    assert desk.link.at(0).delay_s == 0.15 and desk.memory_bytes == 900 * 10**6
    assert trial.run.training.local_steps == 3 and trial.settings.at_most_s == 60
    assert trial.run.round.min_devices == 4, "a trial waits for its whole fleet"


def test_a_run_file_stands_for_sections_and_is_changed_by_those_written_beside_it(written):
    written("[run]\nname = 'mine'\nrounds = 7\n[model]\nbase = 'b'\n", "run.toml")
    trial = read_trial(written("[run]\nfile = 'run.toml'\n[run.run]\nrounds = 2\n" + DEVICE))
    assert (trial.run.run.name, trial.run.run.rounds, trial.run.model.base) == ("mine", 2, "b")


def test_a_trace_is_played_back(written):
    written("t_s,up_bps,down_bps,rtt_s,loss\n0,1e6,2e6,0.1,0\n5,0,0,0.1,0\n", "bus.csv")
    link = read_trial(written(RUN + DEVICE + 'trace = "bus.csv"\n')).devices[0].link
    assert link.at(1).down_bps == 2e6 and link.at(6).down_bps == 0 and link.lossy


def test_a_device_without_a_link_is_on_loopback(written):
    assert read_trial(written(RUN + DEVICE)).devices[0].link is None


def test_a_remote_fleet_has_names_only(written):
    trial = read_trial(written(RUN + "[[device]]\nname = 'ash'\n"), remote=True)
    assert [d.name for d in trial.devices] == ["ash"]
    with pytest.raises(FleetFileError, match="has data, which a real machine decides itself"):
        read_trial(written(RUN + DEVICE), remote=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RUN, "names no devices"),
        (DEVICE, "[run] is missing"),
        ("[run]\n" + DEVICE, "says nothing of the run"),
        (RUN + DEVICE + 'board = "orin-nan-8gb"\n', "orin-nano-8gb"),
        (RUN + DEVICE + 'link = "lte-por"\n', "lte-poor"),
        (RUN + DEVICE + 'trace = "gone.csv"\n', "there is no trace"),
        (RUN + DEVICE + 'trace = "fleet.toml"\n', "must begin with the line"),
        (RUN + DEVICE + 'trace = "gone.csv"\nlink = "lte"\n', "a trace and a link"),
        (RUN + DEVICE + DEVICE, "two devices named 'ash'"),
        (RUN + DEVICE.replace("ash", "a-1") + DEVICE.replace("ash", "a") + "count = 2\n",
         "two devices named 'a-1'"),
        (RUN + '[[device]]\nname = "ash"\n', "has no code to train on"),
        (RUN + DEVICE.replace("code", "elsewhere"), "elsewhere, which is not there"),
        (RUN + DEVICE.replace("include", "inclde"), "did you mean 'include'"),
        (RUN + DEVICE.replace("ash", "Ash!"), "[[device]] 1 name"),
        (RUN + DEVICE + "count = 0\n", "[[device]] 1 count"),
        (RUN + DEVICE + "up_bps = 1e6\n", "has no down_bps"),
        (RUN + DEVICE + "loss = 1.0\n", "[[device]] 1 loss"),
        (RUN + DEVICE + "outage = { every_s = 5, lasts_s = 9 }\nlink = 'lte'\n", "no time between"),
        (RUN + DEVICE + "outage = { every_s = 9, lasts_s = 2 }\n", "has no up_bps and no down_bps"),
        (RUN + DEVICE + "lnk = 'lte'\n", "did you mean 'link'"),
        (RUN + DEVICE + "agent = { device = { name = 'x' } }\n", "the trial's to write"),
        (RUN + DEVICE + "agent = { polcy = { owner = 'x' } }\n", "did you mean 'policy'"),
        ("[run.modl]\nbase = 'b'\n" + DEVICE, "did you mean 'model'"),
        ("[run.model]\nbse = 'b'\n" + DEVICE, "did you mean 'base'"),
        ("[run]\nfile = 'gone.toml'\n" + DEVICE, "gone.toml cannot be read"),
        (RUN + "[run.round]\nquorum = 2\n" + DEVICE, "[round] quorum"),
        (RUN + DEVICE + "count = 200\n" + DEVICE.replace("ash", "oak") + "count = 200\n",
         "at most 256"),
        ("nonsense", "is not valid TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_sentence(written, text, says):
    with pytest.raises(SketchfleetError) as told:
        read_trial(written(text))
    assert says in str(told.value) and "\n" not in str(told.value)


def test_a_board_that_cannot_train_is_refused(written):
    from profiles.boards import load_boards

    name = next(b.name for b in load_boards().values() if b.no_trainer)
    with pytest.raises(FleetFileError, match="choose another board"):
        read_trial(written(RUN + DEVICE + f'board = "{name}"\n'))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda p: p.name)
def test_shipped_fleets_can_be_read(path):
    assert read_trial(path).devices
