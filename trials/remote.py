"""A run over agents that are enrolled on machines of their own.

Serves the run here, from the [server] section's state folder, whose enrolled devices and join
token it keeps; or follows a coordinator that already serves from there. Starts no agents.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from coordinator.config import RunConfig
from coordinator.serve import open_state
from trials.fleet import FleetError, Sections, await_listening, environment, write_toml


class RemoteFleet:
    """Use as a context manager, which ends the coordinator that it started, if it did."""

    def __init__(
        self, config: RunConfig, sections: Sections, folder: Path, names: Sequence[str]
    ) -> None:
        self._config, self._sections = config, sections
        self._folder, self._names = folder, list(names)
        self._process: subprocess.Popen[bytes] | None = None
        self.state = config.server.state.expanduser().resolve()
        self.serves = not _is_served(self.state)

    @property
    def words(self) -> str:
        """One sentence for people."""
        what = "Serving" if self.serves else "Following the coordinator that serves"
        return f"{what} run {self._config.run.name} on {self._config.server.listen}, {self.state}."

    @property
    def joining(self) -> str:
        """How a device joins."""
        if self._config.server.plain_text:
            return f"the join token {self.state / 'join-token'}"
        return f"sketchfleet-coordinator token create --state {self.state}"

    def __enter__(self) -> RemoteFleet:
        if not self.serves:
            self._require_run()
            return self
        config = self._folder / "run.toml"
        server = {**self._config.server.model_dump(), "state": str(self.state)}
        write_toml(config, {**self._sections, "server": server})
        logs = self._folder / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / "coordinator.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "coordinator.cli", "serve", "--config", str(config)],
                stdout=log, stderr=log, env=environment(), start_new_session=True,
            )  # fmt: skip
        host, _, port = self._config.server.listen.rpartition(":")
        try:
            await_listening((host.strip("[]"), int(port)), self.check, logs / "coordinator.log")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """Raises `FleetError` when the coordinator has failed, or is gone before the end."""
        if self._process is None:
            if not _is_served(self.state):
                raise FleetError(f"the coordinator that served from {self.state} has ended")
        elif self._process.poll() not in (None, 0):
            log = self._folder / "logs" / "coordinator.log"
            lines = log.read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "no output"
            raise FleetError(f"coordinator ended with exit code {self._process.returncode}: {last}")

    def farewell(self, patience_s: float) -> None:
        """Lets the coordinator that was started here tell the devices that the run is over."""
        if self._process is None:
            return
        until = time.monotonic() + patience_s
        while self._process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)

    def _require_run(self) -> None:
        records = open_state(self.state)[0]
        try:
            known = [r.run_id for r in records.all_runs()]
        finally:
            records.close()
        if self._config.run.name not in known:
            raise FleetError(
                f"the coordinator that serves from {self.state} has no run "
                f"{self._config.run.name!r}, only {', '.join(known) or 'none'}; stop it, or name "
                "its run in [run]"
            )


def _is_served(state: Path) -> bool:
    """Whether a coordinator holds this state folder."""
    lock = state / "lock"
    if not lock.is_file():
        return False
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
