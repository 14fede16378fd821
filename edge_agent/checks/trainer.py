"""Whether the trainer's interpreter can train here: asked of it, judged here.

`edge_agent.training.selfcheck` tells facts as lines of JSON; this room reads them, without torch.
The failures that users of Jetsons report and their causes: docs/devices.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_agent.checks.finding import Finding, fail, ok, skip, warn
from edge_agent.probe import MachineFacts
from edge_agent.trainer_process import running

LIMIT_S = 180.0  # imports from an SD card take long
NEEDED = ("torch", "transformers", "peft", "safetensors")
INSTALL = "install Sketchfleet's `train` extra into it: pip install 'sketchfleet[train]'"
MATMUL_ERROR, NF4_ERROR = 0.05, 0.2  # relative; 0.003 and 0.1 are usual
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class SelfCheck:
    """What the interpreter told, and how it ended."""

    facts: tuple[Facts, ...] = ()
    ended: str = ""  # how it broke off; empty when it came to its end
    packages: Mapping[str, Facts] = field(default_factory=dict)

    def stage(self, name: str) -> Facts | None:
        """The fact of a stage; None when it did not come to it."""
        return next((fact for fact in self.facts if fact.get("stage") == name), None)

    @property
    def reached(self) -> str:
        """What it was at when it broke off."""
        begun = [str(fact["what"]) for fact in self.facts if fact.get("stage") == "begin"]
        return begun[-1] if begun else "starting"


def ask(python: str, limit_s: float = LIMIT_S) -> SelfCheck:
    """Runs the self-check in the trainer's interpreter."""
    ended = ""
    try:
        done = subprocess.run(  # noqa: S603 - the owner's interpreter with a module of ours
            [python or sys.executable, *running("edge_agent.training.selfcheck")],
            capture_output=True, timeout=limit_s, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        output = done.stdout
        if done.returncode != 0:
            ended = f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"no answer within {limit_s:.0f} s"
    except OSError as error:
        return SelfCheck(ended=f"cannot be started: {error.strerror}")
    return read(output, ended)


def read(output: bytes, ended: str = "") -> SelfCheck:
    """Lines of JSON as facts; a line that is none is left out."""
    facts = []
    for line in output.decode("utf-8", "replace").splitlines():
        try:
            plain = json.loads(line)
        except ValueError:
            continue
        if isinstance(plain, dict):
            facts.append(plain)
    packages = {str(f["package"]): f for f in facts if f.get("stage") == "import"}
    return SelfCheck(tuple(facts), ended, packages)


def judge(
    told: SelfCheck, facts: MachineFacts, environment: Mapping[str, str], groups: Sequence[str]
) -> list[Finding]:
    """What the facts mean on this machine. `groups`: of the user, by name."""
    found = [_interpreter(told)]
    if told.stage("python") is None:
        return found
    found += _packages(told)
    if told.stage("cuda") is not None:
        found.append(_cuda(told, facts, groups))
    found.append(_allocator(facts, environment))
    found += [
        _attempt(told, "matmul", "bf16 matmul", MATMUL_ERROR),
        _attempt(told, "nf4", "4-bit", NF4_ERROR),
    ]
    return found


def _interpreter(told: SelfCheck) -> Finding:
    python = told.stage("python")
    if python is None:
        return fail("trainer", f"its interpreter {told.ended or 'said nothing'}",
                    "correct [trainer] python in agent.toml")  # fmt: skip
    if told.ended:
        return fail("trainer", f"broke off with {told.ended} while at: {told.reached}",
                    "run `python -m edge_agent.training.selfcheck` with that interpreter to see "
                    "its messages")  # fmt: skip
    return ok("trainer", f"Python {python.get('version')} at {python.get('executable')}")


def _packages(told: SelfCheck) -> list[Finding]:
    broken = {n: f["error"] for n, f in told.packages.items() if "error" in f}
    found = []
    needed = [f"{name} ({broken[name]})" for name in NEEDED if name in broken]
    if needed:
        found.append(fail("packages", f"cannot be imported: {', '.join(needed)}", INSTALL))
    else:
        versions = (f"{n} {f.get('version')}" for n, f in told.packages.items() if n not in broken)
        found.append(ok("packages", ", ".join(versions)))
    if "bitsandbytes" in broken:
        found.append(fail("bitsandbytes", broken["bitsandbytes"],
                          "runs in nf4 and int8 need it; on L4T build it for the board or take "
                          "the Jetson AI Lab wheel"))  # fmt: skip
    return found


def _cuda(told: SelfCheck, facts: MachineFacts, groups: Sequence[str]) -> Finding:
    cuda = told.stage("cuda") or {}
    seen = facts.gpu
    if cuda.get("available"):
        missing = lacks_architecture(str(cuda.get("capability")), cuda.get("architectures", ()))
        name = f"{cuda.get('name')}, compute capability {cuda.get('capability')}"
        if missing:
            return warn("cuda", f"{name}; torch has no code for it ({missing})",
                        "accept it only if the matmul below is well; else take a torch built for "
                        "this board (Jetson AI Lab index)")  # fmt: skip
        return ok("cuda", f"{name}, torch built for CUDA {cuda.get('built')}")
    if seen is None:
        return ok("cuda", "no GPU here; training uses the processor")
    if cuda.get("built") is None:
        return fail("cuda", f"{seen.name} is there, but this torch is built for CPUs only",
                    "install a torch built for CUDA (on JetPack 6 from the Jetson AI Lab index, "
                    "jp6/cu126)")  # fmt: skip
    why = str(cuda.get("why") or "torch gives no reason")
    lacking = [name for name in ("video", "render") if name not in groups]
    mend = "check that the driver is loaded and is new enough for CUDA " + str(cuda.get("built"))
    if facts.board.l4t and int(facts.board.l4t.split(".")[0]) < 38 and _major(cuda) >= 13:
        mend = (f"this torch wants CUDA {cuda.get('built')}, JetPack {facts.board.jetpack} has 12 "
                "or less; take the Jetson AI Lab wheel for it")  # fmt: skip
    elif lacking and "root" not in groups:
        mend = (f"add the user to the groups {' and '.join(lacking)} (usermod -aG); as a service, "
                "SupplementaryGroups=video render and no PrivateDevices=")  # fmt: skip
    elif "801" in why:
        mend = "inside a container, give it read access to /sys (error 801 on Thor)"
    return fail("cuda", f"{seen.name} is there, but torch does not see it: {why}", mend)


def _major(cuda: Facts) -> int:
    head = str(cuda.get("built")).partition(".")[0]
    return int(head) if head.isdigit() else 0


def lacks_architecture(capability: str, architectures: Sequence[str]) -> str:
    """What torch was built for, when that is no good here; empty when it is.

    Code for x.y runs on x.z with z >= y (not across the major number), PTX on anything newer.
    """
    try:
        major, minor = (int(part) for part in capability.split("."))
    except ValueError:
        return ""
    for name in architectures:
        kind, _, digits = name.rstrip("af").partition("_")
        if not digits.isdigit():
            continue
        have = (int(digits[:-1]), int(digits[-1]))
        if kind == "sm" and have[0] == major and have[1] <= minor:
            return ""
        if kind == "compute" and have <= (major, minor):
            return ""
    return ", ".join(architectures) or "nothing"


def _allocator(facts: MachineFacts, environment: Mapping[str, str]) -> Finding:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    said = " ".join(environment.get(name, "") for name in names)
    if facts.board.tegra and "expandable_segments" in said:
        return warn("allocator", "expandable segments fail on Tegra with \"out of memory\" at the "
                    "first megabyte; the trainer leaves the setting out",
                    f"remove it from {' or '.join(names)}")  # fmt: skip
    if facts.board.tegra and "cudaMallocAsync" in said:
        return warn("allocator", "cudaMallocAsync stops at a fraction of the memory on Tegra",
                    f"remove it from {' or '.join(names)}")  # fmt: skip
    return ok("allocator", "torch's own" if not said.strip() else said.strip())


def _attempt(told: SelfCheck, stage: str, name: str, most: float) -> Finding:
    fact = told.stage(stage)
    if fact is None:
        return skip(name, "the self-check did not come to it")
    if "error" in fact:
        text = str(fact["error"])
        mend = "see the trainer's log; try another torch or bitsandbytes"
        if "no kernel image" in text or "named symbol not found" in text:
            mend = ("the wheel has no code for this GPU, or is a server build on L4T: build it "
                    "for the board, or take the Jetson AI Lab wheel")  # fmt: skip
        return fail(name, text, mend)
    error = float(fact["relative_error"])
    if not error <= most:
        mend = "its results are wrong: take another build of torch or bitsandbytes"
        return fail(name, f"relative error {error:.3g}, more than {most}", mend)
    return ok(name, f"relative error {error:.3g} in {float(fact['seconds']):.2f} s")
