"""The jail: an interpreter of its own that shuts a program in, watches it, and ends it.

    python -s -S -B -P sandbox_jail.py < job.json > verdict.json

Three processes. The warden (this one) makes the namespaces, counts memory, processes, output and
time, and ends everything at the end. In a process namespace its child is the first process there,
with whose end the kernel ends all others. The inmate gives up what it does not need and runs the
program, then the tests. Started by `sandbox` only, with an empty environment; imports nothing but
the standard library, `sandbox_kernel` and `sandbox_system`.

The warden never reads the token that proves success: it lies in a pipe from which the inmate takes
it after the last test. A program that exits early, by whatever door, cannot show it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import sysconfig
import time
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

if sys.version_info < (3, 11):
    del sys.path[0]  # the folder of this file, which -P leaves out from 3.11 on
sys.path.append(str(Path(__file__).resolve().parents[2]))
from edge_agent.training import sandbox_kernel as kernel
from edge_agent.training import sandbox_system as system

sys.path.pop()

WORK = "/work"  # the program's own folder inside the private root
POLL_S = 0.02
WATCH_S = 0.1
OUTPUT_KEPT_BYTES = 4096
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
OWN_USER = 1_900_000_000  # plus the process id: a user that owns nothing
NOBODY = 65534
NOT_READY = 120  # exit status of an inmate that could not be shut in


class JailError(Exception):
    """The program cannot be kept in here; says what is missing."""


class Jail:
    """One program: what it may use, and what keeps it in."""

    def __init__(self, job: dict[str, Any], token_fd: int) -> None:
        self.job = job
        self.token_fd = token_fd
        self.without = set(job["without"])  # what not to use although it is there
        self.folder = str(job["folder"])
        self.is_root = os.geteuid() == 0
        self.protections: list[str] = []
        self.has_process_namespace = False
        self.user = os.geteuid()
        self.group = os.getegid()
        self.threads = 0  # that count towards the user's processes already

    # --- the warden -----------------------------------------------------------------------------

    def enter_namespaces(self) -> None:
        """New process, network, IPC and host name namespaces, where the kernel lets us."""
        if "namespaces" in self.without:
            return
        flags = kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
        flags |= kernel.CLONE_NEWUTS
        if self.is_root:
            with contextlib.suppress(OSError):  # a container's root may not: then as anyone
                kernel.unshare(flags)
                self._has_namespaces()
                return
        try:
            kernel.unshare(flags | kernel.CLONE_NEWUSER)
        except OSError:  # switched off on this system: then without
            return
        # The same user inside as outside; a mapping of more than oneself wants privileges.
        system.write("/proc/self/setgroups", "deny")
        system.write("/proc/self/uid_map", f"{self.user} {self.user} 1")
        system.write("/proc/self/gid_map", f"{self.group} {self.group} 1")
        self.protections.append("user namespace")
        self._has_namespaces()

    def _has_namespaces(self) -> None:
        self.has_process_namespace = True
        self.protections += ["process namespace", "network namespace"]

    def choose(self) -> None:
        """Settles what else is used. Raises `JailError` when that would not keep a program in."""
        root = self.has_process_namespace and "root" not in self.without
        landlock = 0 if "landlock" in self.without else kernel.landlock_version()
        seccomp = "seccomp" not in self.without and kernel.has_seccomp()
        in_user_namespace = "user namespace" in self.protections
        if self.is_root and not in_user_namespace:
            self.user = self.group = self._unprivileged()
            self.protections.append("unprivileged user")
        else:
            self.threads = system.threads_of(self.user)  # before Linux 5.14 all of a user's count
        if root:
            self.protections.append("private root")
        if landlock:
            self.protections.append(f"Landlock {landlock}")
        if seccomp:
            self.protections.append("seccomp")
        self.protections += ["limits", "watch"]
        missing = []
        if not (root or landlock):
            missing.append("files (a mount namespace or Landlock)")
        if not (root or seccomp):  # sockets that are files: neither Landlock's nor a namespace's
            missing.append("the network (a network and a mount namespace, or seccomp)")
        if not (self.has_process_namespace or seccomp):
            missing.append("other processes (a process namespace or seccomp)")
        if self.is_root and not in_user_namespace and not root and not system.others_can_read():
            missing.append(
                f"the interpreter's own library, which only root can read "
                f"({sysconfig.get_path('stdlib')})"
            )
        if missing:
            raise JailError("nothing here would protect " + " nor ".join(missing))

    def _unprivileged(self) -> int:
        """A user id that owns nothing and runs nothing; in small id ranges, nobody's."""
        own = OWN_USER + os.getpid()
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        inside = any(int(first) <= own < int(first) + int(count) for first, _, count in ranges)
        return own if inside else NOBODY

    def run(self) -> dict[str, Any]:
        """Shuts the program in, waits for its end or ends it; the verdict as plain values."""
        out_r, out_w = os.pipe()
        report_r, report_w = os.pipe()
        ready_r, ready_w = os.pipe()
        began = time.monotonic()
        first = os.fork()
        if first == 0:
            self._child(out_w, report_w, ready_w)
        for fd in (out_w, report_w, ready_w, self.token_fd):
            os.close(fd)
        pipes = {out_r: bytearray(), report_r: bytearray(), ready_r: bytearray()}
        outcome, status = "", 0
        try:
            outcome, status = self._watch(first, pipes, out_r, began)
        finally:
            self._end(first)
        system.drain(pipes, len(pipes[out_r]) + OUTPUT_KEPT_BYTES)
        said = bytes(pipes[out_r][-OUTPUT_KEPT_BYTES:]).decode("utf-8", "replace")
        if not pipes[ready_r]:
            raise JailError(said.strip().rpartition("\n")[2] or "the jail did not come about")
        return {
            "outcome": outcome or ("ended" if status == 0 else _ending(status)),
            "report": bytes(pipes[report_r][:256]).decode("ascii", "replace"),
            "output": said,
            "seconds": time.monotonic() - began,
            "protections": self.protections,
        }

    def _watch(
        self, first: int, pipes: dict[int, bytearray], out: int, began: float
    ) -> tuple[str, int]:
        """Until the first process ends: ("", its status), or what was exceeded."""
        limits, looked = self.job["limits"], 0.0
        ended_pipes: set[int] = set()
        while True:
            system.read_some(pipes, ended_pipes, POLL_S)
            if len(pipes[out]) > limits["output_bytes"]:
                return "too much output", 0
            ended, status = os.waitpid(first, os.WNOHANG)
            if ended:
                return "", status
            now = time.monotonic()
            if now - began > limits["wall_s"]:
                return "timeout", 0
            if now - looked < WATCH_S:
                continue
            looked = now
            inside = list(system.descendants(os.getpid()))
            if len(inside) > limits["processes"] + 1:
                return "too many processes", 0
            if sum(map(system.resident_bytes, inside)) > limits["memory_bytes"]:
                return "out of memory", 0
            on_disk = "private root" not in self.protections
            if on_disk and system.folder_bytes(self.folder) > limits["disk_bytes"]:
                return "disk full", 0

    def _end(self, first: int) -> None:
        """Nothing that the program started is left after this."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 10.0
        # As the reaper of orphans, the warden gets every process that its own parent left.
        while left := list(system.descendants(os.getpid())):
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    continue
            if time.monotonic() > deadline:
                raise JailError(f"processes {left} do not end; restart the device")
            time.sleep(0.005)

    # --- the first process ----------------------------------------------------------------------

    def _child(self, out: int, report: int, ready: int) -> NoReturn:
        """Never returns: what goes wrong before the program runs is told on `out`."""
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process is then deaf to it
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            if not self.has_process_namespace:
                self._inmate(out, report, ready)
            if "private root" in self.protections:
                self._private_root()
            inmate = os.fork()
            if inmate == 0:
                self._inmate(out, report, ready)
            kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
            os.closerange(0, 1024)  # so that the pipes end with the program
            while True:
                ended, status = os.wait()
                if ended == inmate:
                    # A signal's number travels as 128 + n, as in shells.
                    os._exit(os.waitstatus_to_exitcode(status) % 256)
        except BaseException as error:  # noqa: BLE001 - nothing of the warden may run on here
            for fd in (out, 2):  # the inmate has the pipe at 2, having closed all others
                with contextlib.suppress(OSError):
                    os.write(fd, f"{type(error).__name__}: {error}\n".encode())
                    break
        finally:
            os._exit(NOT_READY)

    def _private_root(self) -> None:
        """A new root: the interpreter's library read-only, four devices, and an empty folder."""
        limits = self.job["limits"]
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        new, plain = self.folder, kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount("sandbox", new, "tmpfs", plain, "size=1m,mode=0755")
        for path in system.library_folders():
            place = Path(new + path)
            if Path(path).is_symlink():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(Path(path).readlink())
                continue
            place.mkdir(parents=True, exist_ok=True)
            kernel.mount(path, str(place), "", kernel.MS_BIND | kernel.MS_REC)
            kernel.make_read_only(str(place))
        Path(new, "dev").mkdir()
        for device in DEVICES:
            Path(new + device).touch(0o600)
            kernel.mount(device, new + device, "", kernel.MS_BIND)
        Path(new + WORK).mkdir()
        size = f"size={limits['disk_bytes']},nr_inodes={limits['files']},mode=0700"
        owner = f",uid={self.user},gid={self.group}"
        kernel.mount("work", new + WORK, "tmpfs", plain, size + owner)
        kernel.change_root(new)
        kernel.mount("", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | plain)

    # --- the inmate -----------------------------------------------------------------------------

    def _inmate(self, out: int, report: int, ready: int) -> NoReturn:
        """Gives up everything, then runs the program."""
        os.setsid()
        work = WORK if "private root" in self.protections else self.folder
        if self.is_root and work != WORK:
            os.chown(work, self.user, self.group)
        os.chdir(work)
        nothing = os.open("/dev/null", os.O_RDONLY)
        for fd, place in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(fd, place)
        # At numbers that a program could only find by trying them all.
        token, told = (system.moved(fd) for fd in (self.token_fd, report))
        ready = system.moved(ready)
        kept = sorted((token, told, ready))
        for low, high in zip([3, *(fd + 1 for fd in kept)], [*kept, 4096], strict=True):
            os.closerange(low, high)
        self._limit()
        if self.is_root and "user namespace" not in self.protections:
            os.setgroups([])
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        if "unprivileged user" in self.protections:
            os.setresgid(self.group, self.group, self.group)
            os.setresuid(self.user, self.user, self.user)
        if not self.is_root or "user namespace" in self.protections:
            kernel.drop_capabilities()  # changing the user has done so otherwise
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # changing the user forgot it
        if any(name.startswith("Landlock") for name in self.protections):
            readable = ["/"] if work == WORK else system.library_folders()
            kernel.apply_landlock(readable, [work, *DEVICES])
        if "seccomp" in self.protections:
            kernel.apply_seccomp(not self.has_process_namespace)
        os.environ.clear()
        os.environ.update({"HOME": work, "TMPDIR": work, "LANG": "C.UTF-8", "PATH": ""})
        program, tests = self.job["program"], self.job["tests"]
        self.job.clear()
        os.write(ready, b"1")
        os.close(ready)
        _carry_out(program, tests, token, told)

    def _limit(self) -> None:
        limits = self.job["limits"]
        cpu = int(limits["cpu_s"]) + 1
        processes = int(limits["processes"]) + self.threads
        for kind, most in (
            (resource.RLIMIT_CPU, cpu),
            (resource.RLIMIT_AS, int(limits["memory_bytes"])),
            (resource.RLIMIT_FSIZE, int(limits["disk_bytes"])),
            (resource.RLIMIT_NOFILE, int(limits["files"])),
            (resource.RLIMIT_NPROC, processes),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            _, hard = resource.getrlimit(kind)
            bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (bound, bound))


def _carry_out(program: str, tests: str, token: int, told: int) -> NoReturn:
    """The program, then the tests, in one namespace; after the last test the token is shown.

    What is used afterwards is taken hold of before, so that replacing it changes nothing.
    """
    read, write, leave, show = os.read, os.write, os._exit, traceback.print_exc
    trace, profile, perform = sys.settrace, sys.setprofile, exec
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.modules.pop("__main__", None)
    space = module.__dict__
    try:
        checks = compile(tests, "<tests>", "exec", dont_inherit=True)
        perform(compile(program, "<program>", "exec", dont_inherit=True), space)
        trace(None)
        profile(None)
        perform(checks, space)
        write(told, read(token, 256))
    except BaseException:  # noqa: BLE001 - SystemExit too is no success
        show()
        leave(1)
    leave(0)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    number = -code if code < 0 else code - 128
    if number in (signal.SIGKILL, signal.SIGXCPU):
        return "killed"
    return "failed" if 0 < code < 128 else "crashed"


def main() -> int:
    """One job from standard input, one verdict to standard output."""
    starter, token_fd = int(sys.argv[1]), int(sys.argv[2])
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGTERM)
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of `_end`
    if os.getppid() != starter:
        return 1
    with contextlib.suppress(OSError):  # where memory runs out, this goes first
        system.write("/proc/self/oom_score_adj", "1000")
    jail = Jail(json.load(sys.stdin), token_fd)
    try:
        jail.enter_namespaces()
        jail.choose()
        verdict = jail.run()
    except (JailError, OSError) as error:
        verdict = {"outcome": "refused", "output": str(error)}
    finally:
        system.remove(jail.folder)  # also when the one who made it is gone
    json.dump(verdict, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
