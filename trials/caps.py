"""Limits on memory and processors that the kernel enforces on a process and all it starts.

Control groups where they can be made (version 2, else 1), else a limit on the data segment, which
has no say over processors. Knows the kernel's files only, no fleets.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from profiles.errors import SketchfleetError

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
PERIOD_US = 100_000
Means = Literal["cgroup v2", "cgroup v1", "rlimit"]


class CapError(SketchfleetError):
    """The kernel does not let this user set limits."""


class KernelCap:
    """One limit; processes enter it before they exec. `means` says what enforces it."""

    def __init__(
        self, name: str, memory_bytes: int, cpus: float | None = None, root: Path = CGROUPS
    ) -> None:
        self.memory_bytes, self.cpus = memory_bytes, cpus
        name = f"{name}-{os.getpid()}"
        self.means: Means = "rlimit"
        self._groups: list[Path] = []
        for means, make in (("cgroup v2", self._make_v2), ("cgroup v1", self._make_v1)):
            try:
                make(root, name)
            except OSError:
                self.close()  # half made
                continue
            self.means = means  # type: ignore[assignment]
            return
        if cpus is not None:
            raise CapError(
                "processors can be limited through control groups only, which cannot be made "
                "here; run as root, or leave the processors of the devices open"
            )

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command that enters the cap and becomes `command`, keeping its process id."""
        inside = "".join(f"echo $$ > '{group}/cgroup.procs' && " for group in self._groups)
        if not self._groups:
            inside = f"ulimit -d {self.memory_bytes // 1024} && "
        return ["sh", "-c", f'{inside}exec "$@"', "sh", *command]

    @property
    def kills(self) -> int:
        """Processes that the kernel has killed for memory; 0 where it only refuses memory."""
        for group in self._groups:
            for file in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError):
                    for line in (group / file).read_text().splitlines():
                        if line.startswith("oom_kill "):
                            return int(line.split()[1])
        return 0

    def close(self) -> None:
        """Removes the groups; what still runs in them is waited for a little."""
        for group in self._groups:
            until = time.monotonic() + 5
            while group.exists():
                try:
                    group.rmdir()
                except OSError:
                    if time.monotonic() > until:
                        raise CapError(
                            f"processes still run in {group}; end them and remove it"
                        ) from None
                    time.sleep(0.05)
        self._groups = []

    def _make_v2(self, root: Path, name: str) -> None:
        group = root / _own(OWN_GROUPS, "") / name
        if not (root / "cgroup.controllers").is_file():
            raise FileNotFoundError(root / "cgroup.controllers")
        group.mkdir()
        self._groups.append(group)
        (group / "memory.max").write_text(str(self.memory_bytes))
        if self.cpus is not None:
            (group / "cpu.max").write_text(f"{int(self.cpus * PERIOD_US)} {PERIOD_US}")

    def _make_v1(self, root: Path, name: str) -> None:
        group = root / "memory" / _own(OWN_GROUPS, "memory") / name
        group.mkdir()
        self._groups.append(group)
        (group / "memory.limit_in_bytes").write_text(str(self.memory_bytes))
        if self.cpus is None:
            return
        group = root / "cpu" / _own(OWN_GROUPS, "cpu") / name
        group.mkdir()
        self._groups.append(group)
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(int(self.cpus * PERIOD_US)))


def _own(table: Path, controller: str) -> str:
    """The process's own group under a controller ("" for version 2), relative."""
    for line in table.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            return group.strip("/")
    raise FileNotFoundError(f"no control group of {controller or 'version 2'}")
