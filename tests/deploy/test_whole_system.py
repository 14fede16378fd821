"""The installer as root under a real systemd, booted in a throw-away copy of this machine.

The copy is an overlay: what is written stays in a scratch folder. It has its own network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from .conftest import INSTALLER, make_wheel

pytestmark = pytest.mark.slow

BOOT_S = 60.0
BOOT = """
set -e
cd $1
mount --make-rprivate /
mount -t overlay overlay -o lowerdir=/,upperdir=$1/upper,workdir=$1/work $1/root
cd $1/root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir tmp/given old
mount --bind $1/given tmp/given
mount --rbind /dev dev
if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
  mount -t cgroup2 cgroup2 sys/fs/cgroup
else
  mount -t tmpfs tmpfs sys/fs/cgroup
  mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
  mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
  mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
fi
pivot_root . old
umount -l old
rmdir old
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd \
  --unit=basic.target
"""
# What boots and tools write by themselves.
NOT_OURS = ("var/log/", "var/tmp/", "var/lib/systemd/", "run/", "tmp/", "root/", "old")
NOT_OURS_EITHER = (".pwd.lock", "passwd-", "group-", "shadow-", "gshadow-", "subuid-", "subgid-")
PROGRAM = """
import asyncio, pathlib, sys
from service_manager import ServiceManager
def main():
    words = sys.argv[1:]
    state = pathlib.Path("/var/lib/sketchfleet/agent")
    if words[0] == "enroll":
        (state / "identity").mkdir()
        (state / "identity" / "pair.json").write_text(sys.stdin.read())
    if words[0] == "run" and READY:
        manager = ServiceManager()
        manager.ready("as told")
        hangs = state / "hangs"
        asyncio.run(manager.keep_alive(lambda: not hangs.exists(), lambda: "as told"))
    return int(words[0] == "run")
"""


def make_service(folder: Path, version: str, ready: bool) -> None:
    """A wheel whose `run` tells systemd what the real one tells, or never comes up."""
    wheel = make_wheel(folder, version)
    speaks = INSTALLER.parents[1] / "profiles" / "service_manager.py"
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["stand_in.py"] = f"{PROGRAM}READY = {ready}\n".encode()
    files["service_manager.py"] = speaks.read_bytes()
    record = next(name for name in files if name.endswith("/RECORD"))
    files[record] = "".join(f"{name},,\n" for name in files).encode()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture
def machine(tmp_path):
    """Runs a shell command in the booted copy; returns what it said."""
    if os.geteuid() != 0:
        pytest.skip("only root can boot a copy of this machine")
    for needed in ("/lib/systemd/systemd", "/usr/bin/python3"):
        if not Path(needed).exists():
            pytest.skip(f"{needed} is not on this machine")
    if subprocess.run(["/usr/bin/python3", "-c", "import ensurepip"], check=False).returncode:
        pytest.skip("the system's Python has no venv module")
    for name in ("upper", "work", "root", "given"):
        (tmp_path / name).mkdir(exist_ok=True)
    make_service(tmp_path / "given" / "good", "1.0.0", ready=True)
    make_service(tmp_path / "given" / "bad", "2.0.0", ready=False)
    shutil.copytree(INSTALLER.parent / "systemd", tmp_path / "given" / "systemd")
    shutil.copy(INSTALLER, tmp_path / "given")
    (tmp_path / "given" / "join").write_text("secret")
    spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
    with (tmp_path / "boot.log").open("w") as log:
        process = subprocess.Popen(
            ["unshare", *spaces, "--fork", "--kill-child", "sh", "-c", BOOT, "boot", tmp_path],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def go(command: str, code: int = 0) -> str:
        done = subprocess.run(
            ["nsenter", "--target", children.read_text().split()[0], "--mount", "--uts", "--ipc",
             "--net", "--pid", "--cgroup", "--root", "--wd", "env", "-i", "HOME=/root",
             "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c", command],
            capture_output=True, text=True, check=False, timeout=180, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    until = time.monotonic() + BOOT_S
    try:
        while True:
            if process.poll() is not None or time.monotonic() > until:
                pytest.skip(f"systemd does not boot here: {(tmp_path / 'boot.log').read_text()}")
            try:
                go("systemctl is-system-running --wait")
                break
            except (AssertionError, IndexError, OSError):
                time.sleep(0.5)
        yield go
    finally:
        process.kill()
        process.wait()


def written(upper: Path) -> set[str]:
    """What in the copy is not as on this machine."""
    found = set()
    for path in upper.rglob("*"):
        name, here = str(path.relative_to(upper)), Path("/") / path.relative_to(upper)
        if name.startswith(NOT_OURS) or path.name in NOT_OURS_EITHER:
            continue
        same = here.exists() and (
            path.is_dir()
            or (path.is_file() and here.is_file() and path.read_bytes() == here.read_bytes())
        )
        if not same:
            found.add(name)
    return found


def eventually(holds, patience_s=30.0):
    until = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.3)


def test_a_service_is_installed_watched_upgraded_taken_back_and_gone(machine, tmp_path):
    def shown(name: str) -> str:
        return machine(f"systemctl show -P {name} sketchfleet-agent").strip()

    before = written(tmp_path / "upper")
    install = "cd /tmp/given && sh install.sh"
    settings = "mkdir -p /tmp/x && echo '# mine' >/tmp/x/agent.toml"
    said = machine(f"{settings} && {install} --config /tmp/x/agent.toml --join join good")
    assert "enrolled" in said
    assert shown("ActiveState") == "active" and shown("StatusText") == "as told"
    assert machine("stat -c '%U %a' /var/lib/sketchfleet/agent").split() == [
        "sketchfleet-agent", "700"
    ]  # fmt: skip
    assert "nothing to do" in machine(f"{install} good")

    # A service that no longer gets on is started again.
    machine(
        "cd /run/systemd/system && mkdir sketchfleet-agent.service.d && "
        r"printf '[Service]\nWatchdogSec=2\nRestartSec=0\n' >sketchfleet-agent.service.d/t.conf && "
        "systemctl daemon-reload && systemctl restart sketchfleet-agent"
    )
    machine("touch /var/lib/sketchfleet/agent/hangs")
    eventually(lambda: shown("NRestarts") != "0")
    machine("rm /var/lib/sketchfleet/agent/hangs")
    eventually(lambda: shown("ActiveState") == "active")

    # An upgrade that never says READY is taken back.
    said = machine(f"{install} bad", code=1)
    assert "1.0.0-" in said and "runs again" in said
    eventually(lambda: shown("ActiveState") == "active")
    assert "/versions/1.0.0-" in machine("readlink -f /opt/sketchfleet/agent/current")

    machine(f"{install} --uninstall --purge")
    assert written(tmp_path / "upper") == before
    assert "sketchfleet" not in machine("cat /etc/passwd /etc/group; ls /etc/systemd/system")
