"""A device's own adapter, out of its home, as it is written for others to load. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from edge_agent.training.home import HomeError, load_home
from protos.contract import AdapterSpec
from protos.whole_adapter import WholeAdapter, with_branch


def own_adapter(home_path: Path, spec: AdapterSpec) -> WholeAdapter | None:
    """Ditto's adapter if the home holds one, else the slice as last trained with its personal
    parts; None where it holds neither.

    A branch that it was trained beside becomes further rows. Raises `HomeError` on a home that
    cannot be read, `MissingExtraError` without safetensors.
    """
    home = load_home(home_path, spec)
    adapter = home.personal or home.slice
    if not adapter:
        return None
    factors = {}
    for m in spec.modules:
        parts = adapter[m.name]
        scale = home.alpha / spec.divisor(len(parts["down"]))
        factors[m.name] = with_branch(spec, parts, scale, home.side.get(m.name))
    ranks = {len(down) for _, down in factors.values()}
    if len(ranks) != 1:
        raise HomeError(
            f"{home_path} holds modules of ranks {sorted(ranks)}; the next round of run "
            f"{spec.run_id} begins it anew"
        )
    dense = {t.name: adapter[t.name]["dense"] for t in spec.dense if t.name in adapter}
    return WholeAdapter(spec, ranks.pop(), factors, dense, home.round + 1)
