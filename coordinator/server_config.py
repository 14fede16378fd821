"""[server], [pki] and [web] of run.toml: where the coordinator is reached, by whom, and where it
keeps its state.

Light: a command that only looks for a coordinator loads nothing else of its settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

from profiles.errors import ExitCode, SketchfleetError
from profiles.layers import load_layered
from profiles.places import find_config, state_folder
from profiles.settings import Section, host_of, is_loopback

ENVIRONMENT = "SKETCHFLEET_COORDINATOR"
"""SKETCHFLEET_COORDINATOR__SECTION__KEY stands above run.toml."""

NameRule = Literal["spiffe", "common-name", "dns"]


class ConfigError(SketchfleetError):
    """run.toml cannot be read or holds something that cannot be run."""

    exit_code: ClassVar[ExitCode] = ExitCode.SETTINGS


class ServerSection(Section):
    """Where the coordinator listens and what it keeps."""

    listen: str = "127.0.0.1:8470"
    """For enrolled devices: mutual TLS 1.3."""
    enrolment: str = ""
    """For devices that join: TLS, with a join token. The next port of `listen` when empty."""
    plain_text: bool = False
    """No TLS at all and one join token for everybody, for trials within this machine."""
    state: Path = Path("state")
    """Folder for the database, blobs and the certificate authority. When not given: systemd's
    STATE_DIRECTORY; /var/lib/sketchfleet/coordinator for a file in /etc/sketchfleet; "state" beside
    a file that lies elsewhere."""
    credential_days: Annotated[float, Field(gt=0)] = 7.0
    """How long a device's certificate lasts; it is renewed at two thirds of that."""
    approval: bool = False
    """Whether an operator has to `approve` each device that joins."""

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        host = host_of(self.listen)
        if self.plain_text and not is_loopback(host):
            raise ValueError(
                f"listen: {host} is not a loopback address; plain_text is for trials within one "
                "machine, take it out and make an authority with `sketchfleet-coordinator init`"
            )
        if self.enrolment:
            host_of(self.enrolment)
        return self

    @property
    def enrolment_place(self) -> str:
        """host:port of the enrolment listener."""
        host, _, port = self.listen.rpartition(":")
        return self.enrolment or f"{host}:{int(port) and (int(port) + 1) % 65536}"


class PkiSection(Section):
    """Certificates of your own PKI in place of the fleet's authority; nothing is enrolled then."""

    ca: Path
    """Roots that devices' certificates are verified up to, PEM. Read at every handshake."""
    certificate: Path
    """The coordinator's, with what stands between it and the root, PEM."""
    key: Path
    """Its private key, PEM; readable to the coordinator alone."""
    device_name: NameRule = "spiffe"
    """Where a certificate names its device: the path of its SPIFFE id (after /device/, if that is
    how it begins), its common name, or its only DNS name."""

    def placed(self, here: Path) -> PkiSection:
        """The same with absolute paths."""
        keys = ("ca", "certificate", "key")
        return self.model_copy(update={k: here / getattr(self, k).expanduser() for k in keys})


class WebSection(Section):
    """The dashboard, /metrics and /healthz (`docs/dashboard.md`); they only show."""

    listen: str = "127.0.0.1:9464"
    """"" serves none of them."""
    token_file: Path | None = None
    """Holds what visitors must show; without it, only this machine may be listened on."""

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.listen and not is_loopback(host_of(self.listen)) and self.token_file is None:
            raise ValueError(
                f"[web] listen {self.listen} can be reached from elsewhere and needs a token_file"
            )
        return self


class ServiceFile(Section):
    """What run.toml says of the service; its other sections are not looked at."""

    model_config = ConfigDict(extra="ignore")

    server: ServerSection = ServerSection()
    web: WebSection = WebSection()


def find_run_toml(given: Path | None) -> Path:
    """The file that was given, or the first in the standard places; ./run.toml if there is none."""
    return given or find_config("run.toml") or Path("run.toml")


def load_service(path: Path | None, given: Sequence[str] = ()) -> ServiceFile:
    """[server] and [web] as they are in force; path None: no file. Raises `ConfigError`."""
    known = tuple(ServiceFile.model_fields)
    ours = tuple(f"{ENVIRONMENT}__{section.upper()}__" for section in known)
    environ = {name: text for name, text in os.environ.items() if name.startswith(ours)}
    given = [words for words in given if words.partition(".")[0].strip() in known]
    found = load_layered(path, ServiceFile, ConfigError, ENVIRONMENT, given, environ).settings
    return found.model_copy(update={"server": placed_state(found.server, path)[0]})


def usual_state() -> Path:
    """The state folder of the coordinator that `serve` without options is."""
    return load_service(find_config("run.toml")).server.state


def placed_state(
    server: ServerSection, path: Path | None, sources: Mapping[str, str] | None = None
) -> tuple[ServerSection, dict[str, str]]:
    """The same with an absolute state folder, and the sources with who says where it is.

    path: run.toml. What nobody says is at its standard place (`profiles.places`).
    """
    told = dict(sources or {})
    path = path or Path("run.toml")
    if "state" in server.model_fields_set:
        state = path.resolve().parent / server.state.expanduser()
    else:
        state, source = state_folder("coordinator", path, "state")
        if source != "default":
            told["server.state"] = source
    return server.model_copy(update={"state": state}), told
