"""How often each address opens connections, and which ones wait before they may open more.

Handshakes are dear and come before anybody is known, so addresses are counted: of IPv6 the /64.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping

from coordinator.limits import MOST_ADDRESSES, Bucket
from coordinator.tarpit import Network

log = logging.getLogger("sketchfleet.coordinator")

DIALS_PER_S, DIALS_BURST = 20.0, 300.0  # from one address, perhaps a lab's; an agent dials twice
LOUD_DIALS = 40  # that a stranger's connection counts as which is not heard any more
MOST_UNSEEN = 10  # dials that one new connection may stand for
SHUT_OUT_S = 10.0  # at once, at most
TELL_S = 60.0  # between two lines of the log on one matter


class _Address:
    def __init__(self, now: float) -> None:
        self.dials = Bucket(DIALS_PER_S, DIALS_BURST, now)
        self.waits_until = self._told_at = float("-inf")

    def tell(self, network: Network, now: float) -> None:
        if now > self._told_at + TELL_S:
            self._told_at = now
            log.warning("%s opens more than %.0f connections a second; further ones from there "
                        "wait", network, DIALS_PER_S)  # fmt: skip


class Dialling:
    """The books. `begun` may be called from any thread, which may lose one now and then."""

    def __init__(self) -> None:
        self._begun = 0
        self._addresses: OrderedDict[Network, _Address] = OrderedDict()
        self._waiting: frozenset[Network] = frozenset()

    def begun(self) -> None:
        """A handshake begins, nobody knows whose."""
        self._begun += 1

    def shut_out(
        self, now: float, new: Counter[Network], said: Mapping[Network, float]
    ) -> frozenset[Network]:
        """Those that wait now, by the connections that were seen to be new since the last time.

        Dials that ended unseen are put down to the addresses of those that were seen: of a flood
        there are some at any moment. said: what their strangers said since then, as shares of what
        one may say.
        """
        begun, self._begun = max(self._begun, new.total()), 0
        waiting = set(self._waiting)
        each = min(MOST_UNSEEN, begun / max(1, new.total()))
        for network in new.keys() | said.keys():
            own = self._addresses.pop(network, None) or _Address(now)
            self._addresses[network] = own
            if len(self._addresses) > MOST_ADDRESSES:
                self._addresses.popitem(last=False)
            dials = each * new[network] + LOUD_DIALS * said.get(network, 0.0)
            if wait_s := own.dials.take(now, float("inf"), dials):
                own.waits_until = now + min(wait_s, SHUT_OUT_S)
                own.tell(network, now)
                waiting.add(network)
        self._waiting = frozenset(
            network for network in waiting & self._addresses.keys()
            if self._addresses[network].waits_until > now
        )  # fmt: skip
        return self._waiting
