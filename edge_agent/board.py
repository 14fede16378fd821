"""Which board this is: Jetson module, SoC, L4T, JetPack, CUDA and power mode; or none of that.

Read from the device tree, /etc and nvpmodel; no jetson-stats, no root. Facts and their sources:
docs/devices.md. Knows no sensors.
"""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass

from edge_agent.machine import Machine

# Compute capability by system on chip.
CAPABILITIES = {
    "tegra210": "5.3", "tegra186": "6.2", "tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0",
}  # fmt: skip
# The most specific that a version of L4T begins with counts.
JETPACKS = {
    "39.2": "7.2", "38.4": "7.1", "38.2": "7.0", "36.5": "6.2.2", "36.4.7": "6.2.1",
    "36.4.4": "6.2.1", "36.4.3": "6.2", "36.4": "6.1", "36.3": "6.0", "36.2": "6.0 DP",
    "35.6.4": "5.1.6", "35.6": "5.1", "35": "5", "32.7.6": "4.6.6", "32.7": "4.6", "32": "4",
}  # fmt: skip
MODULES = {
    "p3767-0000": "Orin NX 16GB", "p3767-0001": "Orin NX 8GB", "p3767-0003": "Orin Nano 8GB",
    "p3767-0004": "Orin Nano 4GB", "p3767-0005": "Orin Nano 8GB developer kit",
    "p3701-0000": "AGX Orin 32GB developer kit", "p3701-0004": "AGX Orin 32GB",
    "p3701-0005": "AGX Orin 64GB", "p3834-0008": "AGX Thor T5000", "p3668": "Xavier NX",
    "p2888": "AGX Xavier", "p3448": "Nano",
}  # fmt: skip
MODULE = re.compile(r"p(?:3767|3701|3834|3668|2888|3448)-\d{4}")
RELEASE = re.compile(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)")
POWER_MODE = re.compile(r"NV Power Mode:\s*(\S+)")
TREE = "/proc/device-tree"


@dataclass(frozen=True)
class BoardFacts:
    """What could be found out; empty where nothing says it."""

    model: str = ""  # as the device tree names it
    compatible: tuple[str, ...] = ()
    soc: str = ""  # "tegra234"
    module: str = ""  # "p3767-0005"
    l4t: str = ""  # "36.4.3"
    cuda: str = ""  # of /usr/local/cuda
    tegra: bool = False

    @property
    def module_name(self) -> str:
        """What the module is sold as."""
        return MODULES.get(self.module) or MODULES.get(self.module.partition("-")[0], "")

    @property
    def jetpack(self) -> str:
        """The JetPack that this L4T belongs to."""
        parts = self.l4t.split(".")
        tries = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((JETPACKS[known] for known in tries if known in JETPACKS), "")

    @property
    def capability(self) -> str:
        """Compute capability of the GPU on the chip, "8.7"."""
        return CAPABILITIES.get(self.soc, "")


def find_board(machine: Machine, kernel: str | None = None) -> BoardFacts:
    """The board as its files tell it; `kernel` is the release of the running one."""
    kernel = platform.release() if kernel is None else kernel
    compatible = machine.strings(f"{TREE}/compatible")
    socs = (name.removeprefix("nvidia,") for name in compatible)
    soc = next((name for name in socs if name in CAPABILITIES), "")
    l4t = _l4t(machine)
    trees = " ".join((machine.text(f"{TREE}/nvidia,dtsfilename") or "", *compatible))
    named = MODULE.findall(trees)
    return BoardFacts(
        model=machine.text(f"{TREE}/model") or "",
        compatible=compatible,
        soc=soc,
        module=named[0] if named else "",
        l4t=l4t,
        cuda=_cuda(machine),
        tegra=bool(soc or l4t) or "tegra" in kernel,
    )


def _l4t(machine: Machine) -> str:
    """The version of Linux for Tegra, from its release file, else from its package."""
    lines = (machine.text("/etc/nv_tegra_release") or "").splitlines()
    found = RELEASE.match(lines[0]) if lines else None
    if found is not None:
        return f"{found[1]}.{found[2]}"
    if not machine.path(TREE).exists():
        return ""  # no board at all; spares a PC the call
    package = machine.tool("dpkg-query", "-W", "-f", "${Version}", "nvidia-l4t-core") or ""
    version = package.partition("-")[0].strip()
    return version if re.fullmatch(r"\d+(\.\d+)+", version) else ""


def _cuda(machine: Machine) -> str:
    text = machine.text("/usr/local/cuda/version.json")
    if text is not None:
        try:
            return str(json.loads(text)["cuda"]["version"])
        except (ValueError, KeyError, TypeError):
            return ""
    for path in machine.found("/usr/local/cuda*/lib64/libcudart.so.*"):
        return path.rpartition(".so.")[2]
    return ""


def power_mode(machine: Machine, board: BoardFacts) -> str:
    """The power mode as nvpmodel names it ("25W"); empty where there are none or it hides it."""
    if not board.tegra:
        return ""
    found = POWER_MODE.search(machine.tool("nvpmodel", "-q") or "")
    if found is not None:
        return found[1]
    # nvpmodel wants root on some releases; what it wrote down does not.
    number = re.search(r"pmode:0*(\d+)", machine.text("/var/lib/nvpmodel/status") or "")
    if number is None:
        return ""
    modes = machine.text("/etc/nvpmodel.conf") or ""
    named = re.search(rf"POWER_MODEL\s+ID={number[1]}\s+NAME=(\S+)", modes)
    return named[1] if named is not None else f"mode {number[1]}"


def recognised(board: BoardFacts, gpu_name: str, memory_total_bytes: int) -> str:
    """Its name in the catalogue of known boards; empty when it is none of them."""
    from profiles.boards import recognise

    return recognise(board.model, board.compatible, gpu_name, memory_total_bytes)
