"""Keeps the engine on the newest adapter that this device holds, round after round.

Knows what the agent keeps and how an adapter becomes a file of the engine. What cannot be used is
told once, and the engine goes on with what it has.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from edge_agent.adapters import Newest, Whose, newest_adapter, signature
from edge_agent.inference import Engine
from edge_agent.inference_adapter import write_whole
from edge_agent.inference_folder import InferenceError
from profiles.errors import SketchfleetError

log = logging.getLogger("sketchfleet.agent")

LOOK_S = 2.0  # between two looks at the state folder


@dataclass(frozen=True)
class Serving:
    """What an adapter file of the engine holds. The bare base: all fields empty."""

    run: str = ""
    round: int | None = None
    whose: str = "none"
    name: str = ""

    @property
    def fingerprint(self) -> str:
        """For `system_fingerprint`: differs whenever the weights do."""
        return f"{self.run}-r{self.round}-{self.whose}-{self.name[:8]}" if self.name else "base"


class NewestAdapter:
    """Watches a state folder. `refresh` is for one thread at a time; the rest for any."""

    def __init__(
        self, engine: Engine, state: Path, folder: Path, whose: Whose | None = None
    ) -> None:  # fmt: skip
        """`folder`: where adapter files go, for nobody else."""
        self._engine, self._state, self._folder, self._whose = engine, state, folder, whose
        self._seen: object = None
        self._known = {"": Serving()}
        self._ended = threading.Event()
        self.problem = ""  # why the newest adapter is not in use, in words

    def serving(self, name: str) -> Serving:
        """What an adapter that the engine names is."""
        return self._known.get(name, Serving(name=name))

    def refresh(self) -> bool:
        """Looks once; whether another adapter is in use now."""
        now = signature(self._state)
        if now == self._seen:
            return False
        try:
            swapped = self._take(newest_adapter(self._state, whose=self._whose))
        except (SketchfleetError, OSError) as error:
            if str(error) != self.problem:
                log.warning("the newest adapter is not served: %s", error)
            self.problem = str(error)
            swapped = False
        else:
            self.problem = ""
        self._seen = now
        return swapped

    def _take(self, found: Newest | None) -> bool:
        if found is None:
            return False
        spec, info = found.adapter.spec, self._engine.info
        if spec.base_digest != info.base_digest:
            raise InferenceError(
                f"run {spec.run_id} trains another base ({spec.base_digest[:12]}) than was "
                f"exported ({info.base}, {info.base_digest[:12]}); export-base that one and name "
                "it in [serve] model"
            )
        file = write_whole(found.adapter, self._folder)
        name = file.stem
        self._known[name] = Serving(found.run, found.adapter.round, found.whose, name)
        if name == self._engine.adapter:
            return False
        seconds = self._engine.swap(file)
        told = {"run": found.run, "rounds": found.adapter.round, "whose": found.whose,
                "swap_ms": round(1e3 * seconds, 1)}  # fmt: skip
        log.info("serving a new adapter", extra=told)
        self._clear()
        return True

    def _clear(self) -> None:
        """Removes files of adapters that no request runs on."""
        used = set(self._engine.adapters)
        for path in self._folder.iterdir():
            if path.stem not in used:
                path.unlink()
        for name in set(self._known) - used - {""}:
            del self._known[name]

    def watch(self) -> None:
        """Looks again and again until `end`; for a thread of its own."""
        while not self._ended.wait(LOOK_S):
            self.refresh()

    def end(self) -> None:
        """Ends `watch`."""
        self._ended.set()
