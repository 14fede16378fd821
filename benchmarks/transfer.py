"""Moving updates and slices, many clients at once, against bare gRPC streams of the same bytes.

A real coordinator process and the agent's own link code on loopback; devices are fake and do not
train. The clients of either side are in as many processes: 8 clients in 8, 100 in 10. Both sides'
processes are warm and connected, and start when a word reaches them; a figure is bytes of all
clients over the seconds from that word to the last answer. For us an answer to "up" is the
receipt, with the update hashed, synced to disk, decoded, checked and entered in the database, and
"down" ends with a file whose SHA-256 is right. "round": every client fetches, then pushes, in its
own time.

Peers (`_bare_grpc`), all in turn with ours, in plain text, or with `--tls` all over mutual TLS:
"bare": one stream a client, messages of 1 MiB, gRPC's own settings, bytes thrown away.
"fastest": the best of such streams with messages of 128 KiB, 512 KiB or 1 MiB, and, for the last
two, with HTTP/2 frames as large as ours; in each turn whichever it is.
"files": the sender reads a file; the receiver writes one and takes the SHA-256. 512 KiB, large
frames.
"durable": the same, and the server syncs what came up before it answers: the least that whoever
gives a receipt for a file must do.

Ratios are medians over turns (lowest and highest beside them) of our rate over theirs. Processor
time is of clients and server together.

`--slow`: a fast client beside 200 slow ones. `--agent`: what an agent's network process holds.
`--link`: over 1 Mbit/s, 300 ms, 2 % loss and outages, against plain TCP; needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._bad_links import measure_agent, measure_link, measure_slow
from benchmarks._bare_grpc import bare_server
from benchmarks._crowd import Crowd, cpu_s, crowd
from benchmarks._fleet_case import MIB, Case, coordinator, join_words
from benchmarks._one_agent import resident_bytes
from benchmarks._throwaway_certificates import make as make_certificates

WORDS = ("down", "up", "round")
PEERS = {  # (frames, kind, message bytes)
    "bare": ("", "memory", MIB),
    "bare 128 KiB": ("", "memory", 128 * 1024),
    "bare 512 KiB": ("", "memory", 512 * 1024),
    "bare 1 MiB, large frames": ("large", "memory", MIB),
    "bare 512 KiB, large frames": ("large", "memory", 512 * 1024),
    "files": ("large", "files", 512 * 1024),
    "durable": ("large", "durable", 512 * 1024),
}  # fmt: skip


@dataclass(frozen=True)
class Clients:
    """So many processes of so many clients, each of which moves about so many bytes each way."""

    processes: int
    each: int
    size_bytes: int

    @property
    def names(self) -> list[list[str]]:
        """By process."""
        return [
            [f"d{process}-{number}" for number in range(self.each)]
            for process in range(self.processes)
        ]


@dataclass(frozen=True)
class Figure:
    """One word carried out by one side."""

    bytes_per_s: float
    cpu_s_per_mib: float  # clients and server


def measure(clients: Clients, repeats: int, *, secured: bool = False) -> dict[str, Any]:
    """Ours and the peers by turns, over mutual TLS if `secured`.

    The first turn, in which connections are made, does not count.

    An assignment takes one update, so a turn needs two devices a client: "up" and "round".
    """
    laps = 2 * (repeats + 1)
    devices = clients.processes * clients.each * laps
    with contextlib.ExitStack() as stack:
        case = Case(devices, clients.size_bytes)
        fleet, folder = stack.enter_context(coordinator(case, secured=secured))
        certificates = str(folder) if secured else ""
        if secured:
            make_certificates(folder)
        ours = stack.enter_context(crowd(clients.processes, "benchmarks._our_clients"))
        pid = fleet.processes["coordinator"].pid
        joined = ours.do(
            "join", [{"names": names} for names in clients.names], laps=laps, folder=str(folder),
            address=f"127.0.0.1:{fleet.port}",
            words=join_words(fleet, devices),
        ).answers[0]  # fmt: skip
        bare: dict[str, tuple[Crowd, int]] = {}
        for frames in ("", "large"):
            port, server = stack.enter_context(bare_server(frames, certificates))
            peer = crowd(clients.processes, "benchmarks._bare_grpc", "join", frames, certificates)
            bare[frames] = stack.enter_context(peer), server
            bare[frames][0].do(
                "dial", [{"names": [f"{n}-0" for n in names]} for names in clients.names], port=port
            )

        def timed(word: str, side: Crowd, server: int, each_bytes: dict[str, int], **task: Any
        ) -> Figure:  # fmt: skip
            moved = clients.processes * clients.each * sum(
                each_bytes[way] for way in ("up", "down") if word in (way, "round")
            )  # fmt: skip
            _provide(folder, 2 * moved)
            before = cpu_s(server)
            done = side.do(word, **task)
            used = done.cpu_s + cpu_s(server) - before
            return Figure(moved / done.seconds, used * MIB / moved)

        ways = {"up": joined["up_bytes"], "down": joined["down_bytes"]}
        same = {"up": joined["up_bytes"], "down": joined["up_bytes"]}
        turns, grown = [], 0
        for turn in range(repeats + 1):
            figures: dict[str, dict[str, Figure]] = {}
            for word in WORDS:
                if word != "up":
                    ours.do("ready", lap=2 * turn + (word == "round"))
                _forget_peak(pid)
                resident = resident_bytes("VmRSS", pid)
                figures[word] = {"ours": timed(word, ours, pid, ways)}
                grown = max(grown, resident_bytes("VmHWM", pid) - resident)
                for name, (frames, kind, message_bytes) in PEERS.items():
                    figures[word][name] = timed(
                        word, *bare[frames], same, kind=kind, message_bytes=message_bytes,
                        size_bytes=joined["up_bytes"], folder=str(folder),
                    )  # fmt: skip
            if turn:
                turns.append(figures)
    return {
        "clients": clients.processes * clients.each, "processes": clients.processes,
        "bytes_each": joined["up_bytes"], "coordinator_growth_bytes": grown,
        **{word: _summary([turn[word] for turn in turns]) for word in WORDS},
    }  # fmt: skip


def _provide(folder: Path, size_bytes: int) -> None:
    """Leaves so much memory free that held file pages a moment ago.

    A virtual machine gets memory from its host when a page is first touched, which takes ten times
    as long as writing to it; whoever came first would pay for those who come after.
    """
    ballast = folder / "ballast"
    block = bytes(MIB)
    with ballast.open("wb", buffering=0) as stream:
        for _ in range(0, size_bytes, MIB):
            stream.write(block)
    ballast.unlink()


def _forget_peak(pid: int) -> None:
    """From here on VmHWM counts anew."""
    with open(f"/proc/{pid}/clear_refs", "w") as handle:  # noqa: PTH123 - one write
        handle.write("5")


def _summary(turns: list[dict[str, Figure]]) -> dict[str, Any]:
    """Of one word: rates, processor time, and our rate over the peers'."""
    fastest = [
        max((f for name, f in turn.items() if name.startswith("bare")), key=_rate) for turn in turns
    ]
    turns = [{**turn, "fastest": best} for turn, best in zip(turns, fastest, strict=True)]

    def over(name: str, value: Callable[[Figure], float]) -> list[float]:
        return [value(turn["ours"]) / value(turn[name]) for turn in turns]

    peers = [name for name in turns[0] if name != "ours"]
    return {
        "bytes_per_s": {n: statistics.median(t[n].bytes_per_s for t in turns) for n in turns[0]},
        "cpu_s_per_mib": {
            n: statistics.median(t[n].cpu_s_per_mib for t in turns) for n in turns[0]
        },
        "rate_over": {name: statistics.median(over(name, _rate)) for name in peers},
        "rate_over_range": {
            name: (min(over(name, _rate)), max(over(name, _rate))) for name in peers
        },
    }


def _rate(figure: Figure) -> float:
    return figure.bytes_per_s


def _told(found: dict[str, Any]) -> dict[str, Any]:
    print(f"{found['clients']} clients in {found['processes']} processes x "
          f"{found['bytes_each'] / MIB:.1f} MiB; the coordinator grew by "
          f"{found['coordinator_growth_bytes'] / 1e6:.1f} MB")  # fmt: skip
    for word in WORDS:
        of = found[word]
        print(f"  {word:5} {of['bytes_per_s']['ours'] / 1e6:5.0f} MB/s, "
              f"{of['cpu_s_per_mib']['ours'] * 1e3:4.1f} ms of processor a MiB; " + ", ".join(
                  f"{of['rate_over'][peer]:.2f} of {peer} ({low:.2f} to {high:.2f})"
                  for peer in ("bare", "fastest", "files", "durable")
                  for low, high in [of["rate_over_range"][peer]]
              ))  # fmt: skip
        print("        " + ", ".join(
            f"{peer} {of['bytes_per_s'][peer] / 1e6:.0f} MB/s "
            f"{of['cpu_s_per_mib'][peer] * 1e3:.1f} ms" for peer in PEERS
        ), flush=True)  # fmt: skip
    return found


def main() -> None:
    """Prints tables and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer clients and bytes")
    parser.add_argument("--repeats", type=int, help="5, with --quick 1")
    parser.add_argument("--tls", action="store_true", help="everybody over mutual TLS")
    for name in ("slow", "agent", "link"):
        parser.add_argument(f"--{name}", action="store_true", help="measure this instead")
    asked = parser.parse_args()
    cases = [Clients(8, 1, 20 * MIB), Clients(10, 10, 1 * MIB)]
    if asked.quick:
        cases = [Clients(2, 2, 4 * MIB)]
    repeats = asked.repeats or (1 if asked.quick else 5)
    results: dict[str, Any] = {}
    if asked.slow:
        clients, size = (20, MIB) if asked.quick else (200, 2 * MIB)
        results = found = measure_slow(clients, size)
        print(f"a fast client beside {clients} slow ones: {found['up_ratio']:.2f} of its rate up, "
              f"{found['down_ratio']:.2f} down; the coordinator grew by "
              f"{found['growth_bytes'] / 1e6:.1f} MB, then by "
              f"{found['later_growth_bytes'] / 1e6:.1f} MB")  # fmt: skip
    elif asked.agent:
        results = found = measure_agent(20 * MIB)
        print(f"an agent's network process: {found['idle_bytes'] / 1e6:.1f} MB, at most "
              f"{found['peak_bytes'] / 1e6:.1f} MB while it moved 20 MiB each way")  # fmt: skip
    elif asked.link:
        results = found = measure_link(MIB if asked.quick else 4 * MIB)
        print(f"{found['links']}\nup {found['up_bps'] / 1e3:.0f} kbit/s, "
              f"{found['up_of_tcp']:.2f} of TCP; down {found['down_bps'] / 1e3:.0f} kbit/s, "
              f"{found['down_of_tcp']:.2f} of TCP; sent twice "
              f"{found['resent_share']:.2%}")  # fmt: skip
    else:
        results["cases"] = [_told(measure(case, repeats, secured=asked.tls)) for case in cases]
    print(json.dumps({"benchmark": "transfer", "results": results}))


if __name__ == "__main__":
    main()
