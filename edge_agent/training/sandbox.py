"""Runs a program that nobody has read, and says whether it passed its tests.

The program runs in `sandbox_jail`, an interpreter of its own: in new process, network and mount
namespaces where the kernel lets it, under Landlock and seccomp where they are, as a user without
rights where the agent is root, with limits on time, memory, disk, processes and output, with an
empty environment, and ended as a whole. Nothing of it runs in this process. Where neither a private
root nor Landlock would keep it from the device's files, it is not run at all.

A pass is shown by a random token that the tests' end alone gives out, so a program that exits early
or prints what it likes has not passed. One that reads this very file and forges the tests' end from
inside could: pass@k measures models, not adversaries; what it cannot do is harm the device.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from profiles.errors import SketchfleetError

JAIL = Path(__file__).with_name("sandbox_jail.py")
GRACE_S = 15.0  # for the jail itself, beyond the program's time
# A container may let namespaces be made, but no mounts in them: then with less, if that suffices.
FEWER: tuple[tuple[str, ...], ...] = ((), ("root",), ("namespaces",))


class SandboxError(SketchfleetError):
    """Programs cannot be kept in on this device; the message says what is missing."""


@dataclass(frozen=True)
class Limits:
    """What one program may use, with its tests."""

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_bytes: int = 512 * 10**6  # address space of each process, and resident in all
    disk_bytes: int = 16 * 10**6
    files: int = 64  # open at once, and in its folder
    processes: int = 16
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    passed: bool
    # "passed", "failed", "ended" (without finishing the tests), "timeout", "killed", "crashed",
    # "out of memory", "disk full", "too many processes", "too much output"
    outcome: str
    output: str  # the end of what it wrote; for a person, never sent
    seconds: float
    protections: tuple[str, ...]  # what kept it in


def run_program(
    program: str, tests: str, limits: Limits | None = None, *, without: Collection[str] = ()
) -> Verdict:
    """Runs `program` and then `tests` in its namespace; it passed when the tests came to their end.

    without: "namespaces", "root", "landlock", "seccomp": not used although the kernel has them, as
    tests do. Raises `SandboxError` where the program cannot be kept in.
    """
    if sys.platform != "linux":
        raise SandboxError("generated programs are run on Linux only; remove [evaluation] problems")
    limits = limits or Limits()
    token = secrets.token_hex(32)
    job = {"program": program, "tests": tests, "limits": asdict(limits)}
    refusals: list[str] = []
    for fewer in FEWER:
        folder = tempfile.mkdtemp(prefix="sketchfleet-sandbox-")
        settled = {"folder": folder, "without": sorted({*without, *fewer})}
        try:
            told = _jailed(json.dumps(job | settled), token, limits)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # the jail has done so unless it broke
        if told["outcome"] != "refused":
            break
        refusals.append(told["output"])  # the program did not begin
    else:
        raise SandboxError(
            f"generated programs cannot be kept in on this device: {refusals[0]}; remove "
            "[evaluation] problems, or allow user namespaces (sysctl user.max_user_namespaces, "
            "kernel.apparmor_restrict_unprivileged_userns)"
        )
    passed = hmac.compare_digest(told["report"].encode(), token.encode())
    outcome = "passed" if passed else told["outcome"]
    return Verdict(passed, outcome, told["output"], told["seconds"], tuple(told["protections"]))


def _jailed(job: str, token: str, limits: Limits) -> dict[str, Any]:
    """The jail's verdict as plain values."""
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, token.encode())
        os.close(write_end)
        # No user site, no site packages, no bytecode written, no folder of the script in the path.
        safe = ["-P"] if sys.version_info >= (3, 11) else []
        command = [sys.executable, "-s", "-S", "-B", *safe, str(JAIL), str(os.getpid())]
        with subprocess.Popen(  # noqa: S603 - our own interpreter and our own file
            [*command, str(read_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(read_end,),
            env={"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
            text=True,
        ) as process:
            try:
                out, complaint = process.communicate(job, timeout=limits.wall_s + GRACE_S)
            except BaseException:
                process.terminate()  # it ends what it watches first
                try:
                    process.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
    except subprocess.TimeoutExpired as error:
        raise SandboxError("the sandbox did not end in time; see the trainer's log") from error
    finally:
        os.close(read_end)
    try:
        told: dict[str, Any] = json.loads(out)
    except ValueError as error:
        last = complaint.strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        raise SandboxError(f"the sandbox broke: {last}") from error
    return told
