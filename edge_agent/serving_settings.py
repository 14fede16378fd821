"""[serve] of agent.toml: where the completions endpoint listens, and who may ask how much."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from typing_extensions import Self

from profiles.settings import Section, host_of, is_loopback

Count = Annotated[int, Field(ge=1)]


class ServeSection(Section):
    """The endpoint for editors and scripts (`sketchfleet-agent serve`)."""

    model: str = ""
    """The folder that `sketchfleet-agent export-base` wrote."""
    listen: str = "127.0.0.1:8765"
    """Where it is reached."""
    token: SecretStr = SecretStr("")
    """What callers must show ("Authorization: Bearer ..."); needed to listen beyond this machine.
    Better in a file, or as SKETCHFLEET_AGENT__SERVE__TOKEN."""
    token_file: Path | None = None
    """Holds the token; readable to this user alone."""
    origins: tuple[str, ...] = ()
    """Web pages that may ask from a browser, "https://host"; none unless named."""
    adapter: Literal["newest", "own", "fleet"] = "newest"
    """Newest: this device's own where it has one, else the fleet's."""
    threads: Count | None = None
    """Of all requests together; the processors that this process may use when not given."""
    at_once: Annotated[int, Field(ge=1, le=64)] = 4
    """Requests answered at the same time; more of them wait."""
    waiting: Annotated[int, Field(ge=0, le=1000)] = 32
    """Requests that may wait; more are told to come again."""
    most_tokens: Count = 1024
    """Of one completion, whatever a request asks for."""

    @field_validator("listen")
    @classmethod
    def _host_and_port(cls, listen: str) -> str:
        host_of(listen)
        return listen

    @field_validator("origins")
    @classmethod
    def _named(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if odd := [o for o in origins if "://" not in o or o.endswith("/")]:
            raise ValueError(
                f'{odd[0]!r} is no origin; write "https://host" or "https://host:port"'
            )
        return origins

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.token.get_secret_value() and self.token_file is not None:
            raise ValueError("takes token or token_file, not both")
        named = bool(self.token.get_secret_value()) or self.token_file is not None
        if not named and not is_loopback(host_of(self.listen)):
            raise ValueError(
                f"listen {self.listen} can be reached from other machines, which needs a "
                "token_file or token; or listen on 127.0.0.1"
            )
        return self

    def placed(self, here: Path) -> ServeSection:
        """The same with absolute paths."""
        token_file = None if self.token_file is None else here / self.token_file.expanduser()
        model = str(here / Path(self.model).expanduser()) if self.model else ""
        return self.model_copy(update={"model": model, "token_file": token_file})
