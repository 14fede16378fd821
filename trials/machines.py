"""Machines within this one: each its own file system, network, host name and service manager.

    machine "bench-1"                              namespace "lan"
    overlay over /, private /tmp and /run  --- veth, tbf --- bridge --- the other machines
    systemd as process 1

What is installed on this machine shows in all of them, what is written in one stays there. For
trials of installers and services as they are on real machines; memory is not capped. Needs root,
overlayfs, systemd and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from profiles.errors import SketchfleetError

SYSTEMD = Path("/usr/lib/systemd/systemd")
CGROUPS = Path("/sys/fs/cgroup")
NETWORK = "10.77.0"
BOOT_S = 60.0
HALT_S = 20.0
HIDDEN = ("tmp", "root", "home", "var/tmp")  # this machine's own people and scratch

# $1 name, $2 folder of the overlay, then pairs of a folder here and where it is shown inside. The
# control groups name processes and no more. This machine's own services are not started. Not by
# chroot: who lives in one may not make user namespaces, as units do.
_BOOT = """
set -e
root=$2/root
mount --make-rprivate /
mount -t overlay overlay -o lowerdir=/,upperdir=$2/written,workdir=$2/work "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount --rbind /dev "$root/dev"
for hidden in {hidden}; do mount --bind "$2/empty/$hidden" "$root/$hidden"; done
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
if ! test -e "$2/booted"; then
  rm -f "$root"/etc/systemd/system/*.wants/*
  ln -sf /dev/null "$root/etc/systemd/system/console-getty.service"
  touch "$2/booted"
fi
shift 2
while test $# -gt 0; do
  mkdir -p "$root/$2"
  mount --bind "$1" "$root/$2"
  mount -o remount,bind,ro "$root/$2"
  shift 2
done
cd "$root"
pivot_root . mnt
exec chroot . sh -c 'umount -l /mnt && exec "$@"' sh env -i \
  container=sketchfleet-trial PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb \
  {systemd} --system --show-status=0 --unit=multi-user.target
"""


class MachineError(SketchfleetError):
    """A machine cannot be made, or a command in it failed."""


def unavailable() -> str | None:
    """Why machines cannot be made here, if so."""
    if os.geteuid() != 0:
        return "machines of their own need root; run as root"
    for tool in ("ip", "tc", "unshare", "nsenter", "mount", "pivot_root"):
        if shutil.which(tool) is None:
            return f"machines of their own need {tool}; install iproute2 and util-linux"
    if not SYSTEMD.exists():
        return f"machines of their own need {SYSTEMD}; install systemd"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "machines of their own need overlayfs in the kernel"
    return None


class Lan:
    """A bridge that machines are plugged into; each has an address and the others' names."""

    def __init__(self, tag: str, names: Sequence[str], aliases: Mapping[str, str]) -> None:
        """names: of the machines. aliases: further name -> machine."""
        self._space = f"sk-{tag}-lan"
        self._addresses = {name: f"{NETWORK}.{i}" for i, name in enumerate(names, 1)}
        self.hosts = "127.0.0.1 localhost\n" + "".join(
            f"{address} {name}" + "".join(f" {a}" for a, m in aliases.items() if m == name) + "\n"
            for name, address in self._addresses.items()
        )
        _do("ip", "netns", "add", self._space)
        _do("ip", "-n", self._space, "link", "add", "lan", "type", "bridge")
        _do("ip", "-n", self._space, "link", "set", "lan", "up")

    def plug_in(self, name: str, space: str) -> None:
        """Lays a cable from the machine's namespace to the bridge."""
        port = self._port(name)
        _do("ip", "-n", self._space, "link", "add", port, "type", "veth",
            "peer", "name", "eth0", "netns", space)  # fmt: skip
        _do("ip", "-n", self._space, "link", "set", port, "master", "lan", "up")
        _do("ip", "-n", space, "addr", "add", f"{self._addresses[name]}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _do("ip", "-n", space, "link", "set", device, "up")

    def shape(self, name: str, space: str, up_bps: int, down_bps: int) -> None:
        """Bits per second from and to the machine, with half a second of queue."""
        for where, device, bps in (
            (space, "eth0", up_bps),
            (self._space, self._port(name), down_bps),
        ):
            burst = max(3000, bps // 8 // 50)
            _do("tc", "-n", where, "qdisc", "replace", "dev", device, "root", "tbf",
                "rate", f"{bps}bit", "burst", str(burst), "latency", "500ms")  # fmt: skip

    def pull(self, name: str) -> None:
        """Pulls the machine's cable at the bridge; it notices by silence alone."""
        _do("ip", "-n", self._space, "link", "set", self._port(name), "nomaster")

    def put_back(self, name: str) -> None:
        """The cable as before."""
        _do("ip", "-n", self._space, "link", "set", self._port(name), "master", "lan", "up")

    def close(self) -> None:
        """Takes the bridge away."""
        _quietly("ip", "netns", "del", self._space)

    def _port(self, name: str) -> str:
        return f"p{self._addresses[name].rpartition('.')[2]}"


class Machine:
    """One of them; runs shell commands as root within."""

    def __init__(self, tag: str, name: str, folder: Path, lan: Lan) -> None:
        """folder: for what it writes; must not be an overlay itself."""
        self.name, self._folder, self._lan = name, folder.resolve(), lan
        self.space = f"sk-{tag}-{name}"
        self._group = _cgroups() / self.space
        self._first: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def start(self, shown: Mapping[Path, str]) -> None:
        """Boots it and plugs it in. shown: folders of this machine -> where they are inside, to be
        read only. Raises `MachineError`.
        """
        written = self._folder / "written"
        for part in ("written/etc", "work", "root"):
            (self._folder / part).mkdir(parents=True, exist_ok=True)
        for hidden in HIDDEN:
            (self._folder / "empty" / hidden).mkdir(parents=True, exist_ok=True)
            (self._folder / "empty" / hidden).chmod(0o1777 if "tmp" in hidden else 0o755)
        (written / "etc/hostname").write_text(f"{self.name}\n")
        (written / "etc/hosts").write_text(self._lan.hosts)
        (written / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
        _do("ip", "netns", "add", self.space)
        self._lan.plug_in(self.name, self.space)
        self._group.mkdir(exist_ok=True)
        script = _BOOT.format(hidden=" ".join(HIDDEN), systemd=SYSTEMD)
        pairs = [word for here, inside in shown.items() for word in (str(here), inside)]
        enter = f'echo $$ > {shlex.quote(str(self._group / "cgroup.procs"))} && exec "$@"'
        with (self._folder / "console.log").open("wb") as log:
            self._first = subprocess.Popen(
                ["sh", "-c", enter, "sh", "nsenter", f"--net=/run/netns/{self.space}",
                 "unshare", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--fork",
                 "--kill-child", "sh", "-c", script, "boot", self.name, str(self._folder), *pairs],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        until = time.monotonic() + BOOT_S
        while time.monotonic() < until:
            if self._first.poll() is not None:
                break
            self._pid = _only_child(self._first.pid)
            if self._pid and self._state() in ("running", "degraded"):
                return
            time.sleep(0.2)
        raise MachineError(f"{self.name} did not boot within {BOOT_S:.0f} s; see "
                           f"{self._folder / 'console.log'}")  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether it was booted and not stopped."""
        return self._pid != 0 and self._first is not None and self._first.poll() is None

    def shell(self, commands: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
        """Runs them with bash in root's home until one fails; output and errors mixed."""
        return subprocess.run(
            self.inside("bash", "-e", "-o", "pipefail", "-c", f"cd; {commands}"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    def inside(self, *command: str) -> list[str]:
        """The command that runs `command` within."""
        home = ["env", "-i", "HOME=/root", "TERM=dumb", "LANG=C.UTF-8",
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]  # fmt: skip
        return ["nsenter", "-t", str(self._pid), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w",
                *home, *command]  # fmt: skip

    def path(self, place: str) -> Path:
        """Where an absolute path of the machine is seen from outside, for copying."""
        return Path(f"/proc/{self._pid}/root{place}")

    def shape(self, up_bps: int, down_bps: int) -> None:
        """Bits per second of its link."""
        self._lan.shape(self.name, self.space, up_bps, down_bps)

    def stop(self) -> None:
        """Halts it and takes away all but what it wrote."""
        if self._first is not None and self._first.poll() is None:
            if self._pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGRTMIN + 3)  # systemd: halt
            try:
                self._first.wait(HALT_S)
            except subprocess.TimeoutExpired:
                self._first.kill()
                self._first.wait()
        _quietly("ip", "netns", "del", self.space)
        for group in sorted(self._group.rglob("*/"), reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()
        with contextlib.suppress(OSError):
            self._group.rmdir()

    def _state(self) -> str:
        asked = subprocess.run(self.inside("systemctl", "is-system-running"), check=False,
                               capture_output=True, text=True)  # fmt: skip
        return asked.stdout.strip()


def _cgroups() -> Path:
    """Where this machine has version 2 of the control groups, alone or beside version 1."""
    return next(
        (p for p in (CGROUPS / "unified", CGROUPS) if (p / "cgroup.procs").exists()), CGROUPS
    )


def _only_child(pid: int) -> int:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return 0
    return int(children[0]) if children else 0


def _do(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise MachineError(f"`{shlex.join(command)}` failed: {done.stderr.strip()}")


def _quietly(*command: str) -> None:
    subprocess.run(command, check=False, capture_output=True)
