"""Models that can be planned for by name, and the shape of whichever model is meant.

`profiles/models/*.json` are the dimensions of published code models in the form of Hugging Face's
config.json; the weights are elsewhere. Never goes to the network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from profiles.catalogue import read_texts, suggestion
from profiles.model import ModelError, ModelShape


@dataclass(frozen=True)
class KnownModel:
    """A published model: our short name, its name on the hub, its dimensions."""

    name: str
    hub_id: str
    shape: ModelShape


@cache
def _models() -> dict[str, KnownModel]:
    found = {}
    for name, text in read_texts("models", ".json"):
        config = json.loads(text)
        found[name] = KnownModel(name, config["_name_or_path"], ModelShape.from_config(config))
    return found


def load_models() -> dict[str, KnownModel]:
    """Every known model by its short name, the smallest first."""
    return dict(sorted(_models().items(), key=lambda item: parameters(item[1].shape)))


def parameters(shape: ModelShape) -> int:
    """All weights but biases."""
    return shape.linear_parameters + shape.other_parameters


def find_model(wanted: str) -> tuple[str, ModelShape]:
    """(what to call it, its dimensions) of a config.json, a model folder, or a known name.

    Known by its short name or its name on the hub. Raises `ModelError`.
    """
    path = Path(wanted).expanduser()
    if path.exists():
        file = path / "config.json" if path.is_dir() else path
        here = path.resolve()
        name = here.parent.name if here.name == "config.json" else here.stem
        return (here.name if path.is_dir() else name), _read(file)
    known = _models()
    hub_ids = {model.hub_id.lower(): model for model in known.values()}
    model = known.get(wanted.lower()) or hub_ids.get(wanted.lower())
    if model is None:
        raise ModelError(
            f"{wanted!r} is neither a config.json, a model folder nor a known model; "
            f"{suggestion(wanted.rpartition('/')[2], tuple(load_models()))}"
        )
    return model.name, model.shape


def _read(file: Path) -> ModelShape:
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{file} is no config.json: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is no config.json: it holds no JSON object")
    try:
        return ModelShape.from_config(config)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
