"""What the kernel drops for us before it costs anything: a flood's messages, and its dialling.

Who is hung up on dials again at once, and a TLS handshake is dear. A deaf connection is not: what
comes on it is dropped, the peer's TCP sends ever more slowly, and gRPC hears nothing. A listener
with a gate drops the first packet (SYN) of those who dial from some addresses; their TCP tries
again after seconds. By filters of classic BPF, for which no rights are needed. Linux.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from array import array
from collections.abc import Collection

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Step = tuple[int, int, int, int]  # code, how far to jump if equal and if not, operand

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # the module `socket` has no names for them
_BYTE, _WORD, _AND, _EQUAL, _JUMP, _RETURN = 0x30, 0x20, 0x54, 0x15, 0x05, 0x06
_IP = 0xFFF00000  # where the IP header begins (SKF_NET_OFF)
_DROP: _Step = (_RETURN, 0, 0, 0)
_PASS: _Step = (_RETURN, 0, 0, 0xFFFFFFFF)
MOST_GATED = 256  # networks; a filter has 4096 steps at most


def deafen(connection: socket.socket) -> None:
    """Nothing that comes on this connection is heard any more. Raises `OSError`."""
    _attach(connection, [_DROP])


def hear(connection: socket.socket) -> None:
    """What comes on this connection, or to this listener, is heard again. Raises `OSError`."""
    connection.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def gate(listener: socket.socket, shut_out: Collection[Network]) -> None:
    """Who dials from there is not heard; connections that are open stay. Raises `OSError`.

    New connections inherit the filter, which never shuts out the address of one.
    """
    _attach(listener, gate_program(list(shut_out)[:MOST_GATED]))


def gate_program(shut_out: Collection[Network]) -> list[_Step]:
    """Of IPv4 the address is looked at, of IPv6 the first 64 bits."""
    four = [int(n.network_address) for n in shut_out if n.version == 4]
    six = [int(n.network_address) >> 64 for n in shut_out if n.version == 6]
    of_six: list[_Step] = []
    for prefix in six:
        of_six += [(_WORD, 0, 0, _IP + 8), (_EQUAL, 0, 3, prefix >> 32),
                   (_WORD, 0, 0, _IP + 12), (_EQUAL, 0, 1, prefix & 0xFFFFFFFF), _DROP]  # fmt: skip
    of_four: list[_Step] = [(_WORD, 0, 0, _IP + 12)]
    for address in four:
        of_four += [(_EQUAL, 0, 1, address), _DROP]
    return [
        (_BYTE, 0, 0, _IP), (_AND, 0, 0, 0xF0), (_EQUAL, 0, 1, 0x40),
        (_JUMP, 0, 0, len(of_six) + 1), *of_six, _PASS, *of_four, _PASS,
    ]  # fmt: skip


def _attach(connection: socket.socket, program: list[_Step]) -> None:
    code = array("B", b"".join(struct.pack("HBBI", *step) for step in program))
    address, _ = code.buffer_info()
    connection.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program), address)
    )
