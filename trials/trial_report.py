"""report.md of a trial, and the comparison of several, from their folders alone.

Says in tables where bytes and seconds went; the pictures are `trials.trial_picture`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from coordinator.phases import PHASE_COLUMNS, DevicePhases, goodput_bps, phase_table
from trials.results import Results, read_results
from trials.trial_picture import compare_trials, links_picture, loss_curve, timeline

COMPARED = ("trial", "method", "devices", "rounds", "seconds", "MB down", "MB up", "sent twice",
            "goodput of the link\ndown / up", "loss before, after")  # fmt: skip


def write_report(folder: Path) -> str:
    """Writes report.md and its pictures; returns the sentences of its top. Raises `LedgerError`."""
    results = read_results(folder)
    pictures = []
    if results.times:
        pictures.append(("Time line", timeline(results, folder / "timeline.png")))
    if results.links:
        pictures.append(("Links", links_picture(results, folder / "links.png")))
    if len(results.curve) > 1:
        pictures.append(("Loss", loss_curve(results, folder / "loss.png")))
    head = headline(results)
    lines = [f"# Trial {results.facts.run}", "", *head, "", "## Devices", "",
             *_markdown(("device", "board", "link", "caps", "k", "rounds", "loss before, after"),
                        device_rows(results)), ""]  # fmt: skip
    if results.phases:
        lines += [
            "## Where bytes and seconds went", "",
            *_markdown(PHASE_COLUMNS, phase_table(results.phases, results.link_rates)), "",
            "Seconds of all rounds together. Goodput is payload over the time of its transfer, "
            "retries and outages included; the link's rate is " + _rate_of(results) + ".", "",
        ]  # fmt: skip
    if bulk := bulk_rows(results):
        lines += ["## Against plain TCP", "",
                  *_markdown(("device", "plain TCP Mbit/s\ndown / up",
                              "goodput Mbit/s\ndown / up", "share\ndown / up"), bulk), "",
                  "One TCP connection each way for every device, over links like theirs, mean of "
                  "those whose links are alike; outages included, timed for "
                  f"{max(b.seconds for b in results.facts.bulk_tcp.values()):.0f} s before the "
                  "run.", ""]  # fmt: skip
    if rounds := round_rows(results):
        lines += ["## Rounds", "",
                  *_markdown(("round", "seconds", "merge s", "arrived", "MB down", "MB up",
                              "loss"), rounds), ""]  # fmt: skip
    for title, path in pictures:
        lines += [f"## {title}", "", f"![{title}]({path.name})", ""]
    if results.facts.fairness:
        lines += ["## Fairness", "", *results.facts.fairness, ""]
    versions = folder / "versions.json"
    if versions.is_file():
        found = json.loads(versions.read_text())
        lines += ["## Versions", "", ", ".join(f"{k} {v}" for k, v in found.items()), ""]
    (folder / "report.md").write_text("\n".join(lines))
    return "\n".join(head)


def headline(results: Results) -> list[str]:
    """The trial in sentences."""
    facts, phases = results.facts, results.phases
    seconds = facts.ended_at - facts.began_at
    lines = [f"{len(facts.devices)} devices, {results.rounds_merged} rounds merged in "
             f"{seconds:.0f} s, {facts.outcome}; {facts.emulation}."]  # fmt: skip
    payload = sum(p.payload_bytes for p in phases)
    if not payload:
        return [*lines, "Nothing was transferred."]
    resent = sum(p.resent_bytes for p in phases)
    lines.append(
        f"{sum(p.down_bytes for p in phases) / 1e6:.2f} MB down, "
        f"{sum(p.up_bytes for p in phases) / 1e6:.2f} MB up; sent twice: {resent / 1e6:.3f} MB, "
        f"{resent / payload:.2%} of payload; {sum(p.resumes for p in phases)} resumes."
    )
    if results.links and not facts.remote:
        carried = packet_bytes(results)
        lines.append(
            f"The links carried {carried / 1e6:.2f} MB as packets, {carried / payload:.2f} times "
            "the payload: headers, acknowledgements, polls and measurements of the link with them."
        )
    if facts.bulk_tcp:
        down, up = (against_bulk(results, way) for way in ("down", "up"))
        lines.append(
            "Goodput against plain TCP on the same links: "
            f"down {_percent(down)}, up {_percent(up)}."
        )
    if results.curve:
        first, last = results.curve[0], results.curve[-1]
        lines.append(f"Fleet mean loss {first[2]:.3f} to {last[2]:.3f} nats per token.")
    return lines


def packet_bytes(results: Results) -> int:
    """What the emulated links delivered, both ways."""
    last = {r["device"]: r["up_bytes"] + r["down_bytes"] for r in results.links}  # running counts
    return sum(last.values())


def against_bulk(results: Results, way: str) -> float | None:
    """Goodput of one direction ("up" or "down") over plain TCP's: all bytes over all their seconds,
    against the mean over the devices. None when nothing moved, or plain TCP was not timed.
    """
    of = [p for p in results.phases if p.device_id in results.facts.bulk_tcp]
    phase = "push" if way == "up" else "fetch"
    moved = sum(p.up_bytes if way == "up" else p.down_bytes for p in of)
    goodput = goodput_bps(moved, sum(p.seconds[phase] for p in of))
    bulk = [getattr(results.facts.bulk_tcp[p.device_id], f"{way}_bps") for p in of]
    return None if goodput is None or not sum(bulk) else goodput * len(bulk) / sum(bulk)


def _rate_of(results: Results) -> str:
    if results.links and not results.facts.remote:
        return "the emulated one's mean over the same time, 0 in outages"
    return "the device's own estimate at that time"


def device_rows(results: Results) -> list[list[str]]:
    """A row per device of the trial."""
    rows = []
    for device, facts in results.facts.devices.items():
        of = [r for r in results.ledger if r["device"] == device]
        trained = [r for r in of if not r["evaluate_only"]]
        losses = [r["loss_global_received"] for r in of if r["loss_global_received"] is not None]
        ks = sorted({r["k"] for r in trained})
        rows.append([
            device, next((r["board"] for r in of if r["board"]), ""), facts.link, facts.caps,
            "" if not ks else f"{ks[0]} to {ks[-1]}" if len(ks) > 1 else str(ks[0]),
            str(sum(r["outcome"] == "done" for r in trained)),
            f"{losses[0]:.3f}, {losses[-1]:.3f}" if len(losses) > 1 else "-",
        ])  # fmt: skip
    return rows


def bulk_rows(results: Results) -> list[list[str]]:
    """Goodput against plain TCP, a row per device whose link was timed."""
    rows = []
    for p in results.phases:
        bulk = results.facts.bulk_tcp.get(p.device_id)
        if bulk is None:
            continue
        rows.append([
            p.device_id, f"{bulk.down_bps / 1e6:.3f} / {bulk.up_bps / 1e6:.3f}",
            f"{_mbit(p.down_bps)} / {_mbit(p.up_bps)}",
            f"{_share(p.down_bps, bulk.down_bps)} / {_share(p.up_bps, bulk.up_bps)}",
        ])  # fmt: skip
    return rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _mbit(bps: float | None) -> str:
    return "-" if bps is None else f"{bps / 1e6:.3f}"


def _share(bps: float | None, of_bps: float) -> str:
    return _percent(None if bps is None or not of_bps else bps / of_bps)


def round_rows(results: Results) -> list[list[str]]:
    """A row per round."""
    rows = []
    for round_ in sorted({r["round"] for r in results.ledger}):
        of = [r for r in results.ledger if r["round"] == round_]
        first = of[0]
        losses = [r["loss_global_received"] for r in of if r["loss_global_received"] is not None]
        closed, merge_s = first["closed_at"], first["merge_s"]
        rows.append([
            f"{round_ + 1}{' (evaluation)' if first['evaluate_only'] else ''}",
            "-" if closed is None else f"{closed - first['opened_at']:.0f}",
            "-" if merge_s is None else f"{merge_s:.3f}",
            f"{sum(r['outcome'] == 'done' for r in of)} of {len(of)}",
            f"{sum(r['down_bytes'] or 0 for r in of) / 1e6:.2f}",
            f"{sum(r['up_bytes'] or 0 for r in of) / 1e6:.2f}",
            f"{sum(losses) / len(losses):.3f}" if losses else "-",
        ])  # fmt: skip
    return rows


# --- several ---


def compared_rows(found: Sequence[Results]) -> list[list[str]]:
    """A row per trial, columns as `COMPARED`."""
    return [_compared(results) for results in found]


def _compared(results: Results) -> list[str]:
    phases, rates = results.phases, results.link_rates
    payload = sum(p.payload_bytes for p in phases)
    resent = sum(p.resent_bytes for p in phases)
    curve = results.curve
    methods = sorted({r["method"] for r in results.ledger})
    return [
        results.folder.name, ", ".join(methods), str(len(results.facts.devices)),
        str(results.rounds_merged), f"{results.facts.ended_at - results.first_opened_at:.0f}",
        f"{sum(p.down_bytes for p in phases) / 1e6:.2f}",
        f"{sum(p.up_bytes for p in phases) / 1e6:.2f}",
        f"{resent / payload:.2%}" if payload else "-",
        f"{_of_links(phases, rates, 1)} / {_of_links(phases, rates, 0)}",
        f"{curve[0][2]:.3f}, {curve[-1][2]:.3f}" if len(curve) > 1 else "-",
    ]  # fmt: skip


def _of_links(
    phases: Sequence[DevicePhases],
    rates: Mapping[str, tuple[float | None, float | None]],
    way: int,
) -> str:
    """Bits moved over what the links could have carried in that time; `way` 0 up, 1 down."""
    moved = could = 0.0
    for p in phases:
        rate = rates[p.device_id][way]
        if rate is not None:
            moved += 8 * (p.up_bytes, p.down_bytes)[way]
            could += rate * p.seconds[("push", "fetch")[way]]
    return f"{moved / could:.0%}" if could else "-"


def plot(folders: Sequence[Path], out: Path | None) -> str:
    """Makes one trial's report anew, or compares several in `out`; returns what was found.

    Raises `LedgerError`.
    """
    if len(folders) == 1:
        return write_report(folders[0])
    found = [read_results(folder) for folder in folders]
    out = out or Path("trials-compared")
    out.mkdir(parents=True, exist_ok=True)
    compare_trials(found, out / "compared.png")
    lines = ["# Trials compared", "", *_markdown(COMPARED, compared_rows(found)), "",
             "![Loss against time and bytes](compared.png)", ""]  # fmt: skip
    (out / "compared.md").write_text("\n".join(lines))
    return "\n".join(lines[2:-2]) + f"{out / 'compared.md'}, {out / 'compared.png'}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cell.replace("\n", ", ") for cell in cells) + " |"
            for cells in (columns, ["---"] * len(columns), *rows)]  # fmt: skip
