"""Where a namespace's link ends on this machine: joins connections to a port on loopback.

Moves bytes between sockets; knows no packets and no shaping.
"""

from __future__ import annotations

import contextlib
import socket
import threading

# Beside what the link's two ends hold: a doorway that took in whole files would hide from senders
# that the link is slow, and hold up whatever comes after them.
HELD_BYTES = 64 * 1024


class Doorway:
    """Listens on `host`:`port` and joins each caller to 127.0.0.1:`port`."""

    def __init__(self, host: str, port: int) -> None:
        self._port = port
        self._listener = socket.create_server((host, port), backlog=128)
        self._thread = threading.Thread(target=self._accept, name=f"doorway-{host}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening; connections end with their peers."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in accept
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                callee = _dial(self._port)
            except OSError:
                caller.close()  # as a host without that service would
                continue
            for source, target in ((caller, callee), (callee, caller)):
                threading.Thread(target=_copy, args=(source, target), daemon=True).start()


def _dial(port: int) -> socket.socket:
    """A connection to a port on loopback that holds little."""
    callee = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        callee.setsockopt(socket.SOL_SOCKET, buffer, HELD_BYTES)
    try:
        callee.connect(("127.0.0.1", port))
    except OSError:
        callee.close()
        raise
    return callee


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Moves bytes one way until either end closes; the close is passed on."""
    with contextlib.suppress(OSError):  # a reset on one side ends the other as well
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
