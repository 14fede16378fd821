"""A TCP socket that listens, for servers that are handed one."""

from __future__ import annotations

import socket


def listen_on(place: str) -> socket.socket:
    """place: "host:port", an IPv6 host in brackets; port 0 takes any. Raises `OSError`."""
    host, _, port = place.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), int(port)))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener
