"""A device's place in the fleet by certificate: renewed by itself, long before it ends.

A fresh certificate proves itself with a call before the old one is given up. One that expired while
the device slept is replaced by the proof of its key.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import grpc

from edge_agent.identity import Identity, IdentityError, Pair
from edge_agent.link import Link, LinkError, RefusedError
from edge_agent.membership import MembershipError
from edge_agent.returning import enroll_again
from edge_agent.signing import fresh_key
from profiles.compat import wait_for
from protos.contract import Reason

log = logging.getLogger("sketchfleet.agent")

RENEW_AT, JITTER = 2 / 3, 0.05  # of a certificate's life
TRY_AGAIN_S = 600.0  # after a renewal that failed, or a tenth of the life if that is shorter
PROOF_S = 20.0  # for the first call with a fresh certificate
AWAIT_APPROVAL_S = 20.0
T = TypeVar("T")


class CertifiedMembership:
    """Makes calls with the certificate that enrolling gave."""

    def __init__(self, identity: Identity, link: Link) -> None:
        self._identity, self._link = identity, link
        self._renewing = asyncio.Lock()
        self._renew_at = 0.0
        link.on_trust = self._adopt

    async def sign_on(self) -> None:
        """Settles on a certificate: a fresh one that was never used proves itself first."""
        self._heed()
        if self._identity.is_fresh:
            await self._prove()
        if time.time() > self._link.valid_until:
            await self._regain("this device's certificate has expired")

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """The answer to a call; renews before it when that is due."""
        if time.time() > self._renew_at:
            await self._renew()
        regained = False
        while True:
            try:
                return await make()
            except RefusedError as error:
                if error.reason is Reason.REVOKED:
                    if regained:
                        raise MembershipError(str(error)) from error
                    regained = True
                    await self._regain(str(error))
                    continue
                if error.reason is Reason.PENDING:
                    log.info("%s", error)
                    await asyncio.sleep(AWAIT_APPROVAL_S)
                    continue
                if error.reason is not Reason.BAD_CREDENTIAL:
                    raise
                if time.time() <= self._link.valid_until:
                    raise MembershipError(str(error)) from error
            await self._regain("this device's certificate has expired")

    async def _renew(self) -> None:
        async with self._renewing:
            if time.time() <= self._renew_at:
                return  # another call did
            try:
                made = await asyncio.to_thread(fresh_key)
                answer = await self._link.renew_certificate(made.request)
            except (RefusedError, LinkError, IdentityError) as error:
                # The call that comes next tells what is wrong, if it still is.
                log.warning("certificate not renewed: %s", error)
                self._put_off()
                return
            self._identity.adopt(answer.trust_bundle)
            pair = Pair.new(made.key, answer.certificate, answer.expires_in_s)
            self._identity.renewed(pair)
            await self._prove()

    async def _prove(self) -> None:
        """Uses the fresh pair; goes back to the old one where it gets no answer."""
        self._heed()
        await self._link.secure(self._identity.credentials)
        try:
            await wait_for(self._link.ping(), PROOF_S)
        except (RefusedError, LinkError, TimeoutError) as error:
            log.warning("the fresh certificate got no answer, the old one stays: %s", error)
            self._identity.reject()
            self._heed()
            await self._link.secure(self._identity.credentials)
            self._put_off()
            return
        self._identity.confirm()
        log.info("certificate renewed", extra={"until": round(self._link.valid_until)})

    async def _regain(self, why: str) -> None:
        """A certificate in place of one that is not taken. Raises `MembershipError`."""
        log.warning("enrolling again with this device's key: %s", why)
        while True:
            try:
                await asyncio.to_thread(enroll_again, self._identity)
                break
            except RefusedError as error:
                raise MembershipError(str(error)) from error
            except LinkError as error:
                log.info("%s", error)
                await asyncio.sleep(random.uniform(0.5, 1.0) * 30)  # noqa: S311 - jitter
        self._heed()
        await self._link.secure(self._identity.credentials)
        self._identity.confirm()

    def _heed(self) -> None:
        """Takes note of how long the newest certificate lasts."""
        pair = self._identity.pair
        at = RENEW_AT + random.uniform(-JITTER, JITTER)  # noqa: S311 - jitter
        self._renew_at = pair.made_at + at * (pair.ends_at - pair.made_at)
        self._link.valid_until = pair.ends_at
        self._link.trust_digest = self._identity.trust_digest

    def _put_off(self) -> None:
        pair = self._identity.pair
        self._renew_at = time.time() + min(TRY_AGAIN_S, 0.1 * (pair.ends_at - pair.made_at))

    def _adopt(self, trust: bytes) -> None:
        """New roots: the certificate is renewed soon, which also begins to trust them."""
        try:
            self._identity.adopt(trust)
        except IdentityError as error:
            log.error("%s", error)
            return
        self._link.trust_digest = self._identity.trust_digest
        pair = self._identity.pair
        most_s = min(60.0, 0.05 * (pair.ends_at - pair.made_at))
        soon = random.uniform(0, most_s)  # noqa: S311 - jitter
        self._renew_at = min(self._renew_at, time.time() + soon)
        log.info("the fleet's roots have changed")


class OwnPkiMembership:
    """Makes calls with a certificate that something else renews; follows its files."""

    def __init__(self, link: Link, files: tuple[Path, Path, Path]) -> None:
        self._link, self._files = link, files
        self._read_at = self._changed_at()

    async def sign_on(self) -> None:
        """Nothing to be done."""

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """The answer to a call, with the certificate as it is now."""
        while True:
            if (changed := self._changed_at()) != self._read_at:
                await self._link.secure(own_credentials(*self._files))
                self._read_at = changed
            try:
                return await make()
            except RefusedError as error:
                if error.reason is Reason.PENDING:
                    log.info("%s", error)
                    await asyncio.sleep(AWAIT_APPROVAL_S)
                    continue
                if error.reason in (Reason.REVOKED, Reason.BAD_CREDENTIAL):
                    raise MembershipError(str(error)) from error
                raise

    def _changed_at(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in self._files)


def own_credentials(ca: Path, certificate: Path, key: Path) -> grpc.ChannelCredentials:
    """Of the owner's PKI. Raises `IdentityError`."""
    try:
        return grpc.ssl_channel_credentials(
            ca.read_bytes(), key.read_bytes(), certificate.read_bytes()
        )
    except OSError as error:
        raise IdentityError(
            f"[coordinator] {error.filename} cannot be read: {error.strerror}"
        ) from error
