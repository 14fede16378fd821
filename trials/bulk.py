"""How fast plain TCP moves bytes over an emulated link: what transfers are compared with.

For every device one connection each way, over two links like its own, all at the same time: one
alone would say more of chance, since what an outage costs hangs on single packets. Knows sockets;
nothing of gRPC.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from profiles.errors import SketchfleetError
from profiles.trace import LinkState
from trials.emulation import Emulation, free_number

# Behind the link, so that TCP's two ends are where a device's and a coordinator's would be.
CLIENT = """
import socket, sys, time
host, port = sys.argv[1].rsplit(":", 1)
up, until = sys.argv[2] == "up", time.monotonic() + float(sys.argv[3])
s = socket.create_connection((host, int(port)), timeout=60)
s.sendall(b"u" if up else b"d")
moved, block = 0, bytes(1 << 14)
s.settimeout(0.5)
while time.monotonic() < until:
    try:
        moved += s.send(block) if up else len(s.recv(1 << 16))
    except TimeoutError:
        pass
print(moved)
"""


class BulkError(SketchfleetError):
    """Plain TCP could not be timed."""


@dataclass(frozen=True)
class BulkTcp:
    """Bits per second of a TCP connection, outages included; mean over the devices."""

    up_bps: float
    down_bps: float
    seconds: float


def bulk_tcp(
    emulation: Emulation, links: Sequence[Callable[[float], LinkState]], seconds: float
) -> BulkTcp:
    """Times both directions of every link at once. Raises `BulkError`."""
    ways = [(at, way) for at in links for way in ("up", "down")]
    with contextlib.ExitStack() as stack:
        sinks: list[_Sink] = []
        clients: list[subprocess.Popen[str]] = []
        numbers: list[int] = []
        stack.callback(_end, clients)
        for seed, (at, way) in enumerate(ways):
            sink = stack.enter_context(_Sink())
            numbers.append(free_number(numbers))
            name = f"bulk-{sink.port}"
            link = stack.enter_context(emulation.link(name, numbers[-1], sink.port, at, seed))
            sinks.append(sink)
            clients.append(subprocess.Popen(
                link.wrap([sys.executable, "-c", CLIENT, link.address, way, str(seconds)]),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            ))  # fmt: skip
        began = time.monotonic()
        time.sleep(seconds)
        arrived = [sink.received_bytes for sink in sinks]  # what is in buffers has not arrived
        took_s = time.monotonic() - began
        moved = {"up": 0, "down": 0}
        for (_, way), client, up_bytes in zip(ways, clients, arrived, strict=True):
            out, err = client.communicate(timeout=90)
            if client.returncode:
                raise BulkError(f"plain TCP over the link failed: {err.strip()[-300:]}")
            moved[way] += up_bytes if way == "up" else int(out)
    return BulkTcp(
        8 * moved["up"] / len(links) / took_s, 8 * moved["down"] / len(links) / seconds, seconds
    )


def _end(clients: Sequence[subprocess.Popen[str]]) -> None:
    for client in clients:
        if client.poll() is None:
            client.kill()
        client.communicate()


class _Sink:
    """A port on loopback that swallows what comes, or sends without end when asked to."""

    def __init__(self) -> None:
        self.received_bytes = 0

    def __enter__(self) -> _Sink:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed, or the client has seen enough
            caller, _ = self._server.accept()
            with caller:
                if caller.recv(1) == b"d":
                    while True:
                        caller.sendall(bytes(1 << 16))
                while data := caller.recv(1 << 16):
                    self.received_bytes += len(data)
