"""Coverage-guided fuzzing of the decoders: `python -m tests.fuzz.run TARGET --inputs 200000`.

By Atheris (libFuzzer), which the extra `fuzz` installs. What reaches something new is kept in
tests/fuzz/corpus/TARGET; an input that crashes, takes more than --seconds or more than --mb
is written to --findings, and the exit code is not 0.
`all` runs every target in turn and splits the inputs, more to those that are fast; `--minimise`
keeps the fewest inputs that reach as much.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

CORPUS = Path(__file__).parent / "corpus"
DECODERS = ("protos.chunk", "protos.codecs", "protos.contract", "protos.gaps", "protos.layout",
            "protos.mirror", "protos.plain_codecs", "protos.transfer", "protos.unpacking",
            "coordinator.certificates", "coordinator.enrolment", "protos.invitation",
            "coordinator.plausible", "coordinator.corrections", "coordinator.plan_search",
            "coordinator.planner", "profiles.cost", "profiles.memory")  # fmt: skip


# Parts of the inputs of `all`.
PARTS = {"packed": 20, "update": 18, "places": 15, "chunk": 15, "part": 4, "mirror": 9,
         "message": 15, "claims": 4, "joining": 5, "invitation": 5}  # fmt: skip


def limit_memory(more_mb: int) -> None:
    """Of address space, from now on: a decoder that asks for more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def limited(decode: Callable[[bytes], None], seconds: int, more_mb: int) -> Callable[[bytes], None]:
    """The same within so many seconds of a processor, and under a limit of memory that follows what
    the fuzzer itself takes, which grows.
    """
    inputs = itertools.count()

    def one(data: bytes) -> None:
        if next(inputs) % 1000 == 0:
            limit_memory(more_mb)
        begun = time.process_time()
        decode(data)
        took_s = time.process_time() - begun
        assert took_s < seconds, f"{took_s:.1f} s"

    return one


def fuzz(target: str, inputs: int, seconds: int, more_mb: int, seed: int, findings: Path) -> None:
    """One target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=list(DECODERS)):
        from tests.fuzz import targets

        for name in DECODERS:
            importlib.import_module(name)

    own, begin = CORPUS / target, findings / f"{target}-seeds"
    for folder in (own, begin):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(targets.seeds(target)):
        (begin / f"{number:03}").write_bytes(data)
    # On a busy machine a second may be a minute: this timeout is for what never ends.
    options = [f"-timeout={60 * seconds}", f"-artifact_prefix={findings}/{target}-",
               f"-seed={seed}", "-max_len=4096", "-len_control=20", "-rss_limit_mb=0",
               f"-runs={inputs}", "-print_final_stats=1", str(own), str(begin)]  # fmt: skip
    decode = limited(targets.TARGETS[target], seconds, more_mb)
    atheris.Setup([sys.argv[0], *options], decode)
    atheris.Fuzz()


def minimise(target: str) -> tuple[int, int]:
    """Removes inputs that reach no step from line to line that smaller ones do not reach.

    Former findings stay. Returns how many there were and are.
    """
    from tests.fuzz.targets import TARGETS

    files = {importlib.import_module(name).__file__ for name in DECODERS}
    reached: set[tuple[str, int, int]] = set()
    known: set[tuple[str, int, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> object:
        if frame.f_code.co_filename not in files:
            return None
        last = frame.f_code.co_firstlineno

        def lines(frame: FrameType, event: str, _: object) -> object:
            nonlocal last
            reached.add((frame.f_code.co_filename, last, frame.f_lineno))
            last = frame.f_lineno
            return lines

        return lines

    there = sorted((CORPUS / target).iterdir(), key=lambda path: path.stat().st_size)
    there.sort(key=lambda path: "-crash-" not in path.name)
    TARGETS[target](b"")  # what is built once is no input's
    left = 0
    for path in there:
        data = path.read_bytes()
        reached.clear()
        sys.settrace(trace)
        TARGETS[target](data)
        sys.settrace(None)
        if reached <= known and "-crash-" not in path.name:
            path.unlink()
            continue
        known |= reached
        left += 1
    return len(there), left


def main() -> int:
    """Runs one target here, or all of them as processes of their own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="all, or one of targets.TARGETS")
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seconds", type=int, default=5, help="an input may take")
    parser.add_argument("--mb", type=int, default=64, help="of memory an input may take")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "fuzz")
    parser.add_argument("--minimise", action="store_true")
    asked = parser.parse_args()
    if asked.minimise:
        for target in PARTS if asked.target == "all" else [asked.target]:
            print(target, *minimise(target))
        return 0
    if asked.target != "all":
        fuzz(asked.target, asked.inputs, asked.seconds, asked.mb, asked.seed, asked.findings)
        return 0
    from tests.fuzz.targets import TARGETS

    failed = []
    for target in TARGETS:
        begun, own = time.monotonic(), asked.inputs * PARTS[target] // sum(PARTS.values())
        rest = [*sys.argv[sys.argv.index("all") + 1 :], "--inputs", str(own)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.run", target, *rest],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if line.startswith(("Done", "stat::"))]
        print(f"{target}: {'FAILED' if done.returncode else 'ok'}, "
              f"{time.monotonic() - begun:.0f} s", *said, sep="\n  ", flush=True)  # fmt: skip
        if done.returncode:
            failed.append(target)
            print(done.stderr[-3000:])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
