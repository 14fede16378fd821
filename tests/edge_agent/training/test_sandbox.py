"""A museum of hostile programs: what each tries does not happen, and nothing of it survives.

In four ways of keeping a program in: as whoever runs the tests and, where that is root, as an
ordinary user; with everything the kernel has, and without namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_agent.training import sandbox, sandbox_system
from edge_agent.training.sandbox import Limits, SandboxError, Verdict, run_program

ROOT = Path(__file__).resolve().parents[3]
MUSEUM = sorted((Path(__file__).parents[1] / "hostile").glob("*.py"))
LIMITS = Limits(wall_s=2.0, cpu_s=1.0, memory_bytes=200 * 10**6, disk_bytes=4 * 10**6)
TESTS = "def check(candidate):\n    assert candidate() == 42\n\n\ncheck(answer)\n"
NEVER_PRINTED = ("TAKEN-FILE", "TAKEN-ENVIRONMENT", "ESCAPED")
NOBODY = 65534

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

AS_NOBODY = """
import json, os, sys
from dataclasses import asdict
from edge_agent.training import sandbox
job = json.load(sys.stdin)
sandbox.FEWER = ((),)
try:
    verdict = sandbox.run_program(job["program"], job["tests"], sandbox.Limits(**job["limits"]),
                                  without=job["without"])
    told = asdict(verdict)
except sandbox.SandboxError as error:
    told = {"refused": str(error)}
print(json.dumps([os.getpid(), told]))
"""


def _readable_python() -> str | None:
    """An interpreter that an ordinary user can start, with this repository readable to them."""
    if os.geteuid() != 0:
        return None
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [python, "-B", "-c", "import sys, edge_agent.training.sandbox as s; "
                 "sys.exit(not (sys.version_info >= (3, 11) and open(s.JAIL)))"],
                cwd="/", env={"PYTHONPATH": str(ROOT)}, user=NOBODY, group=NOBODY, extra_groups=[],
                capture_output=True, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return python
    return None


NOBODYS_PYTHON = _readable_python()
STARTERS = {os.getpid()}  # of the jails that these tests ask about


@dataclass(frozen=True)
class Mode:
    """Who runs programs, and without what."""

    name: str
    without: tuple[str, ...]
    as_nobody: bool

    def run(self, program: str, tests: str = TESTS, limits: Limits = LIMITS) -> Verdict:
        """As the trainer would. Skips where this machine cannot."""
        if not self.as_nobody:
            hidden = os.geteuid() == 0 and not sandbox_system.others_can_read()
            if "namespaces" in self.without and hidden:
                pytest.skip("only root can read this interpreter's library")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sandbox, "FEWER", ((),))
                return run_program(program, tests, limits, without=self.without)
        if NOBODYS_PYTHON is None:
            pytest.skip("not root, or no interpreter here that an ordinary user can start")
        job = {"program": program, "tests": tests, "limits": asdict(limits),
               "without": self.without}  # fmt: skip
        done = subprocess.run(
            [NOBODYS_PYTHON, "-B", "-c", AS_NOBODY], input=json.dumps(job), text=True, cwd="/",
            env={"PYTHONPATH": str(ROOT), "MUSEUM": "TAKEN-ENVIRONMENT"}, capture_output=True,
            user=NOBODY, group=NOBODY, extra_groups=[], check=False, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 0, f"the trainer was harmed: {done.returncode} {done.stderr}"
        starter, told = json.loads(done.stdout)
        STARTERS.add(starter)
        if "refused" in told:
            raise SandboxError(told["refused"])
        return Verdict(**told | {"protections": tuple(told["protections"])})


MODES = {
    mode.name: mode
    for mode in (
        Mode("here", (), False),
        Mode("here, no namespaces", ("namespaces",), False),
        Mode("nobody", (), True),
        Mode("nobody, no namespaces", ("namespaces",), True),
    )
}


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> Mode:
    return MODES[request.param]


@dataclass
class Surroundings:
    """What a hostile program could reach, and whether it did."""

    folder: Path
    calls: list[str]
    facts: dict[str, Any]

    def assert_untouched(self) -> None:
        """Nothing was reached, read, changed or left running."""
        assert not self.calls, f"reached {self.calls}"
        secret = Path(self.facts["SECRET"])
        assert secret.read_text() == "TAKEN-FILE" and secret.stat().st_mtime > 10**9
        outside = Path(self.facts["OUTSIDE"])
        assert [p.name for p in outside.iterdir()] == ["kept"], "written or deleted outside"
        for place in ("/escaped", "/tmp/escaped", "/var/tmp/escaped"):
            assert not Path(place).exists(), place
        assert (left := survivors()) == [], f"still running: {left}"


def survivors() -> list[tuple[int, str]]:
    """Processes of jails that were started here; forks keep the words of their command."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                words = (place / "cmdline").read_bytes().split(b"\0")
                jail = next(
                    (i for i, w in enumerate(words) if w.endswith(b"sandbox_jail.py")), None
                )
                if jail is not None and int(words[jail + 1]) in STARTERS:
                    found.append((int(place.name), b" ".join(words).decode()))
    return found


def _same_port() -> tuple[socket.socket, socket.socket]:
    """Sockets for streams and for datagrams on one port of loopback."""
    for _ in range(50):
        tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        tcp.bind(("127.0.0.1", 0))
        try:
            udp.bind(tcp.getsockname())
        except OSError:  # somebody's already
            tcp.close(), udp.close()
            continue
        return tcp, udp
    raise AssertionError("no port is free for both")


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> Iterator[Surroundings]:
    """Listeners, a credential and a folder that anybody may read and write."""
    folder = Path(tempfile.mkdtemp(prefix="museum-"))
    folder.chmod(0o755)
    (folder / "outside").mkdir()
    (folder / "outside").chmod(0o777)
    (folder / "outside" / "kept").write_text("kept")
    (folder / "credential").write_text("TAKEN-FILE")
    (folder / "credential").chmod(0o666)
    monkeypatch.setenv("MUSEUM", "TAKEN-ENVIRONMENT")
    calls: list[str] = []
    tcp, udp = _same_port()
    unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "socket"))
    abstract.bind("")  # the kernel names it
    ends = {"tcp": tcp, "udp": udp, "unix": unix, "abstract": abstract}

    def listen(kind: str) -> None:
        with contextlib.suppress(OSError):
            while ends[kind].recv(9) if kind == "udp" else ends[kind].accept():
                calls.append(kind)

    for kind, end in ends.items():
        if kind != "udp":
            end.listen()
        threading.Thread(target=listen, args=(kind,), daemon=True).start()
    (folder / "socket").chmod(0o777)
    facts = {
        "PORT": tcp.getsockname()[1],
        "SOCKET": str(folder / "socket"),
        "ABSTRACT": abstract.getsockname(),
        "SECRET": str(folder / "credential"),
        "OUTSIDE": str(folder / "outside"),
        "PARENT": os.getpid(),
    }
    yield Surroundings(folder, calls, facts)
    for end in ends.values():
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
    shutil.rmtree(folder)


EVIDENCE = "import sys\n\ndef evidence(text):\n    print(text, file=sys.stderr, flush=True)\n\n"


def exhibit(path: Path, around: Surroundings) -> str:
    """A program of the museum with what it is told of its surroundings."""
    facts = "".join(f"{name} = {value!r}\n" for name, value in around.facts.items())
    return facts + EVIDENCE + path.read_text()


@pytest.mark.parametrize(
    ("name", "word"),
    [("network", ""), ("unix_socket", ""), ("raw_socket_call", "ESCAPED"),
     ("reads_outside", "TAKEN-FILE"), ("reads_environment", "TAKEN-ENVIRONMENT"),
     ("reads_by_link", "TAKEN-FILE"), ("runs_commands", "ESCAPED")],
)  # fmt: skip
def test_without_a_sandbox_the_museum_does_notice(
    name: str, word: str, around: Surroundings, tmp_path: Path
) -> None:
    path = next(path for path in MUSEUM if path.stem == name)
    done = subprocess.run(
        [sys.executable, "-c", exhibit(path, around)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert word in done.stderr + done.stdout
    deadline = time.monotonic() + 5
    while not word and not around.calls and time.monotonic() < deadline:
        time.sleep(0.01)
    assert word or around.calls


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", MUSEUM, ids=[path.stem for path in MUSEUM])
def test_a_hostile_program_is_contained(path: Path, mode: Mode, around: Surroundings) -> None:
    began = time.monotonic()
    verdict = mode.run(exhibit(path, around))
    assert not verdict.passed, verdict
    assert verdict.outcome != "passed"
    for word in NEVER_PRINTED:
        assert word not in verdict.output, verdict.output
    around.assert_untouched()
    assert time.monotonic() - began < 20
    assert len(verdict.output) <= 5000


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("infinite_loop", {"timeout", "killed"}),
        ("sleeper", {"timeout"}),
        ("memory_bomb", {"failed", "out of memory"}),
        ("memory_bomb_in_children", {"out of memory", "too many processes"}),
        ("huge_output", {"too much output"}),
        ("segfault", {"crashed"}),
        ("exits_early", {"ended"}),
        ("exits_politely", {"failed"}),
        ("exits_from_the_tested_function", {"ended"}),
        ("claims_success", {"ended"}),
        ("swallows_the_tests", {"failed"}),
        ("skips_the_tests_by_tracing", {"failed"}),
    ],
)
def test_the_outcome_says_what_happened(name: str, outcomes: set[str], mode: Mode) -> None:
    program = next(path for path in MUSEUM if path.stem == name).read_text()
    assert mode.run(program).outcome in outcomes


def test_a_right_program_passes_and_a_wrong_one_does_not(mode: Mode) -> None:
    right = mode.run("def answer():\n    return 42\n")
    assert (right.passed, right.outcome) == (True, "passed"), right
    wrong = mode.run("def answer():\n    return 41\n")
    assert (wrong.passed, wrong.outcome) == (False, "failed")
    assert "AssertionError" in wrong.output
    assert survivors() == []


def test_what_kept_a_program_in_is_told(mode: Mode) -> None:
    kept = set(mode.run("def answer():\n    return 42\n").protections)
    assert {"limits", "watch"} < kept
    files = "private root" in kept or any(name.startswith("Landlock") for name in kept)
    assert files and ("network namespace" in kept or "seccomp" in kept)
    if mode.without:
        assert not kept & {"process namespace", "network namespace", "private root"}
    if os.geteuid() == 0 and not mode.as_nobody:
        assert "unprivileged user" in kept or "user namespace" in kept


def test_programs_may_do_what_programs_do(mode: Mode) -> None:
    """Objects that equal anything pass, as in HumanEval; files, threads and imports work."""
    program = """
import collections, dataclasses, decimal, functools, hashlib, heapq, itertools, json, math, random
import re, sqlite3, string, subprocess, tempfile, threading, typing, unittest, zlib

class AlwaysEqual:
    def __eq__(self, other): return True

@dataclasses.dataclass
class Point:
    x: "int"

def answer():
    with open("notes", "w") as file:
        file.write("kept")
    assert open("notes").read() == "kept"
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x")
    found = []
    thread = threading.Thread(target=lambda: found.append(hashlib.sha256(b"x").hexdigest()))
    thread.start(), thread.join()
    assert found and Point(1) == Point(1) and typing.get_type_hints(Point) == {"x": int}
    assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
    open("/dev/null", "w").write(str(open("/dev/urandom", "rb").read(3)))
    try:
        input()
    except EOFError:
        return AlwaysEqual()
"""
    verdict = mode.run(program, limits=Limits(wall_s=10))
    assert verdict.passed, verdict


def test_the_tests_run_after_the_program_in_its_names_and_not_as_main(mode: Mode) -> None:
    program = (
        "import sys\nif __name__ == '__main__':\n    sys.exit(3)\ndef answer():\n    return 42"
    )
    assert mode.run(program).passed
    assert not mode.run("from __future__ import annotations\nanswer: nonsense = 0\n").passed
    assert not mode.run("def answer(:\n").passed, "what does not compile does not pass"


def test_nothing_is_run_where_nothing_protects(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    program = f"open({str(mark)!r}, 'w')"
    with pytest.raises(SandboxError, match=r"cannot be kept in .*nothing here would protect files"):
        run_program(program, "", LIMITS, without=("namespaces", "landlock"))
    with pytest.raises(SandboxError, match=r"the network .* nor other processes"):
        run_program(program, "", LIMITS, without=("namespaces", "seccomp"))
    with pytest.raises(SandboxError, match="the network"):
        run_program(program, "", LIMITS, without=("root", "seccomp"))
    assert not mark.exists()


def test_where_mounts_are_refused_less_is_used_if_it_suffices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def jailed(job: str, token: str, limits: Limits) -> dict[str, Any]:
        asked.append(json.loads(job)["without"])
        if len(asked) < 3:
            return {"outcome": "refused", "output": "OSError: mount: Operation not permitted"}
        return {"outcome": "ended", "report": token, "output": "", "seconds": 0.1,
                "protections": ["Landlock 4"]}  # fmt: skip

    monkeypatch.setattr(sandbox, "_jailed", jailed)
    assert run_program("", "").passed
    assert asked == [[], ["root"], ["namespaces"]]


def test_an_interrupted_trainer_leaves_nothing(mode: Mode, around: Surroundings) -> None:
    """The trainer is killed while a program runs that ignores whatever can be ignored."""
    if mode.as_nobody or (mode.without and not sandbox_system.others_can_read()):
        pytest.skip("told by the other modes")
    daemon = next(path for path in MUSEUM if path.stem == "daemon").read_text()
    program = daemon.replace("raise SystemExit", "time.sleep(1000)")
    code = (
        "from edge_agent.training.sandbox import *\n"
        f"run_program({program!r}, '', Limits(wall_s=60), without={mode.without!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}) as trainer:
        STARTERS.add(trainer.pid)
        deadline = time.monotonic() + 20
        while len(survivors()) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(survivors()) >= 3, "it never began"
        trainer.kill()
    deadline = time.monotonic() + 20
    while survivors() and time.monotonic() < deadline:
        time.sleep(0.05)
    around.assert_untouched()


def test_folders_of_programs_are_emptied(mode: Mode) -> None:
    mode.run("import os\nos.mkdir('a')\nopen('a/b', 'w')\ndef answer():\n    return 42\n")
    assert not list(Path(tempfile.gettempdir()).glob("sketchfleet-sandbox-*"))
