"""The run's base model on this device: where it lies, and that it is the one the run means."""

from __future__ import annotations

import asyncio
from pathlib import Path

from profiles.model import ModelError, base_digest, resolve_base
from protos.contract import AdapterSpec


class Bases:
    """Finds a base and takes its digest once. `place` overrides where the run says it lies."""

    def __init__(self, place: str) -> None:
        self._place = place
        self.checked: dict[str, Path] = {}  # digest -> folder

    async def folder(self, spec: AdapterSpec) -> Path:
        """The folder of the run's base, its digest checked. Raises `ModelError`."""
        if spec.base_digest not in self.checked:
            where = self._place or spec.base
            folder = await asyncio.to_thread(resolve_base, where, spec.base_revision or None)
            digest = await asyncio.to_thread(base_digest, folder)
            if digest != spec.base_digest:
                raise ModelError(
                    f"base model {folder} has digest {digest[:12]}, but the run needs "
                    f"{spec.base_digest[:12]}; fetch the same revision or correct [model] base"
                )
            self.checked[spec.base_digest] = folder
        return self.checked[spec.base_digest]
