"""A device's place in the fleet, however it shows who it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from profiles.errors import SketchfleetError

T = TypeVar("T")


class MembershipError(SketchfleetError):
    """The device cannot take part until its owner or the operator acts."""


class Membership(Protocol):
    """Makes calls as this device."""

    async def sign_on(self) -> None:
        """Before the first call. Raises `MembershipError`, `LinkError`."""

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """The answer to a call, whatever becomes of what the device shows. Raises what `make` does,
        and `MembershipError`.
        """
