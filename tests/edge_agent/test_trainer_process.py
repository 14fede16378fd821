"""The trainer may answer, refuse, babble or die: the agent gets a result or one named error.

The trainers here are shell scripts in the place of the interpreter, so no Python starts.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_agent import trainer_process
from edge_agent.trainer_process import TrainerError, TrainerProcess

READ = "read -r job || exit 0\n"
RESULT = 'echo \'{"event":"result","n":1}\'\n'


@pytest.fixture
def make(tmp_path):
    """A trainer process whose interpreter is this shell script."""

    def with_script(body, threads=1):
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\n{body}")
        script.chmod(0o755)
        return TrainerProcess(str(script), threads, tmp_path / "trainer.log")

    return with_script


@pytest.fixture
def pids(tmp_path):
    """The processes started so far."""
    return lambda: [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def loop(body):
    """A script that does this for every job."""
    return f"while true; do\n{READ}{body}done\n"


async def crashes(trainer, sentence, job=None, *, died=True):
    with pytest.raises(TrainerError, match=sentence) as told:
        await trainer.run(job or {"job": "x"})
    assert told.value.outcome == "crashed"
    assert told.value.died is died
    assert "\n" not in str(told.value)


async def test_a_job_goes_in_and_its_result_comes_out(make):
    trainer = make(READ + """printf '{"event":"result","job":%s}\\n' "$job"\n""")
    job = {"job": "train", "text": "two\nlines, naïve", "n": 1}
    assert (await trainer.run(job))["job"] == job, "a job is one line of JSON"
    await trainer.stop()


async def test_progress_is_told_in_order_and_does_not_end_the_job(make):
    steps = "".join(f'echo \'{{"event":"progress","step":{n}}}\'\n' for n in range(3))
    trainer, seen = make(loop(steps + 'echo \'{"event":"later version"}\'\n' + RESULT)), []
    assert (await trainer.run({}, seen.append))["n"] == 1
    assert [event["step"] for event in seen] == [0, 1, 2]
    assert (await trainer.run({}))["n"] == 1, "nobody has to listen"
    await trainer.stop()


async def test_a_warm_trainer_serves_the_next_job(make, pids):
    trainer = make(loop(RESULT))
    for _ in range(3):
        await trainer.run({})
    assert len(pids()) == 1
    await trainer.stop()


async def test_a_named_failure_is_told_and_the_trainer_stays_warm(make, pids):
    failure = 'echo \'{"event":"error","outcome":"out_of_memory","message":"no room"}\'\n'
    trainer = make(READ + failure + loop(RESULT))
    with pytest.raises(TrainerError, match=r"^no room$") as told:
        await trainer.run({})
    assert told.value.outcome == "out_of_memory" and not told.value.died
    assert (await trainer.run({}))["n"] == 1 and len(pids()) == 1
    await trainer.stop()


async def test_a_crash_is_an_answer_with_the_exit_code(make, pids):
    trainer = make(READ + "exit 3\n")
    await crashes(trainer, "ended with exit code 3")
    await crashes(trainer, "ended with exit code 3")
    assert len(pids()) == 2, "after a crash the next job starts a new process"


async def test_a_failure_that_was_answered_is_no_death(make):
    """Training that diverges does so again: only a process that died is worth another try."""
    diverged = 'echo \'{"event":"error","outcome":"crashed","message":"training diverged"}\'\n'
    trainer = make(loop(diverged))
    await crashes(trainer, "training diverged", died=False)
    await trainer.stop()


async def test_a_death_in_the_middle_of_an_answer_is_a_death(make):
    await crashes(make(READ + 'printf \'{"event":"res\'\nexit 5\n'), "ended with exit code 5")


async def test_a_crash_before_the_job_is_read_is_an_answer_too(make):
    large = {"job": "x" * 10**6}  # more than a pipe holds
    await crashes(make("exit 4\n"), "the trainer (broke off|ended with exit code 4)", large)


async def test_a_kill_is_put_down_to_memory(make):
    await crashes(make(READ + "kill -9 $$\n"), "killed, most likely .* for want of memory")


@pytest.mark.parametrize(
    "line", ["loading 3 %", "", "null", "[1]", '"text"', "{}", '{"event":"error"}', '{"event":']
)
async def test_garbage_ends_the_trainer_with_a_named_error(make, pids, line):
    trainer = make(f"{READ}printf '%s\\n' '{line}'\n{loop(RESULT)}")
    await crashes(trainer, "the trainer broke off", died=False)
    assert ended(pids()[0]), "what babbles is not asked again"


async def test_a_line_without_end_does_not_fill_memory(make, monkeypatch):
    monkeypatch.setattr(trainer_process, "LINE_LIMIT_BYTES", 1000)
    trainer = make(READ + "head -c 1500 /dev/zero | tr '\\0' x\n" + loop(RESULT))
    await crashes(trainer, "the trainer broke off", died=False)


async def test_noise_on_standard_error_goes_to_the_log_only(make, tmp_path):
    trainer = make(loop("echo 'warning: secret_function()' >&2\n" + RESULT))
    assert (await trainer.run({}))["n"] == 1
    await trainer.stop()
    assert "secret_function" in (tmp_path / "trainer.log").read_text()


async def test_what_a_dying_trainer_printed_is_not_quoted(make):
    """The sentence travels to the coordinator, and a traceback may quote local code."""
    trainer = make(READ + "echo 'KeyError: secret_function' >&2\nexit 1\n")
    with pytest.raises(TrainerError) as told:
        await trainer.run({})
    assert "secret_function" not in str(told.value)


async def test_stopping_gives_the_memory_back(make, pids):
    trainer = make(loop(RESULT))
    await trainer.run({})
    (pid,) = pids()
    assert not ended(pid)
    await trainer.stop()
    assert ended(pid)
    await trainer.stop()
    assert (await trainer.run({}))["n"] == 1, "the next job starts it again"
    await trainer.stop()


async def test_a_trainer_that_will_not_stop_is_killed(make, pids, monkeypatch):
    monkeypatch.setattr(trainer_process, "STOP_S", 0.2)
    trainer = make(READ + RESULT + "while true; do sleep 0.05; done\n")
    await trainer.run({})
    begun = time.monotonic()
    await trainer.stop()
    assert ended(pids()[0]) and time.monotonic() - begun < 5


async def test_a_trainer_that_closes_its_output_and_goes_on_is_ended(make, pids, monkeypatch):
    monkeypatch.setattr(trainer_process, "STOP_S", 0.2)
    trainer = make(READ + "exec >&-\nwhile true; do sleep 0.05; done\n")
    begun = time.monotonic()
    await crashes(trainer, "closed its output but went on")
    assert ended(pids()[0]) and time.monotonic() - begun < 5


async def test_pauses_are_told_as_they_come(make):
    told = "".join(
        f'echo \'{{"event":"{kind}","why":"warm"}}\'\n' for kind in ("paused", "resumed")
    )
    trainer, seen = make(READ + told + RESULT), []
    await trainer.run({}, seen.append)
    assert [event["event"] for event in seen] == ["paused", "resumed"]
    await trainer.stop()


async def test_a_cancelled_job_does_not_train_on(make, pids):
    trainer = make(READ + 'echo \'{"event":"progress"}\'\nread -r more\n')
    begun = asyncio.Event()
    job = asyncio.create_task(trainer.run({}, lambda event: begun.set()))
    await begun.wait()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert ended(pids()[0])


async def test_a_trainer_that_died_while_idle_is_replaced(make, pids):
    trainer = make(loop(RESULT))
    await trainer.run({})
    os.kill(pids()[0], 9)
    await trainer._process.wait()
    assert (await trainer.run({}))["n"] == 1 and len(pids()) == 2
    await trainer.stop()


async def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    trainer = TrainerProcess(str(tmp_path / "none"), 1, tmp_path / "log")
    sentence = "trainer interpreter .*none cannot be started: .*No such file"
    await crashes(trainer, sentence, died=False)


async def test_the_process_is_started_with_its_module_and_threads(make, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    words = '\\"arguments\\":\\"$1 $3 $4 $5 $6\\",\\"omp\\":\\"$OMP_NUM_THREADS\\"'
    told = f'{{\\"event\\":\\"result\\",{words}}}'
    trainer = make(READ + f'echo "{told}"\n', threads=3)
    result = await trainer.run({})
    assert result["arguments"] == f"-c --threads 3 --agent {os.getpid()}"
    assert result["omp"] == "3"
    await trainer.stop()


def test_any_interpreter_runs_our_code_with_its_own_packages(tmp_path):
    """Its own come first, ours help out, and Sketchfleet itself is always this one."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for place, name, text in (
        (theirs, "numbers_of", "WHOSE = 'theirs'"),
        (ours, "numbers_of", "WHOSE = 'ours'"),
        (ours, "only_here", "WHOSE = 'ours'"),
        (theirs, "protos/__init__", "WHOSE = 'an older one'"),
        (ours, "protos/__init__", "WHOSE = 'ours'"),
        (ours, "profiles/__init__", ""),
        (ours, "edge_agent/__init__", ""),
        (ours, "edge_agent/told", "import numbers_of, only_here, protos, sys\n"
         "print(numbers_of.WHOSE, only_here.WHOSE, protos.WHOSE, sys.argv[1:], __name__)"),
    ):  # fmt: skip
        file = place / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    code = trainer_process.BORROW.format(root=str(ours), module="edge_agent.told")
    done = subprocess.run(
        [sys.executable, "-c", code, "--threads", "3"], cwd=tmp_path, check=True,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(theirs)},
    )  # fmt: skip
    assert done.stdout == "theirs ours ours ['--threads', '3'] __main__\n"


def test_what_runs_is_this_installation():
    option, code = trainer_process.running("edge_agent.training.selfcheck")
    assert option == "-c"
    assert repr(str(Path(trainer_process.__file__).parents[1])) in code
