"""The trainer process: JSON lines in, JSON lines out.

    python -m edge_agent.training.trainer --threads 2

Started by exec and kept warm: a job that fails is told as one error event and the next one is
awaited. Standard output carries events only; what libraries print goes to standard error. Knows
no jobs by content: `jobs.py` does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import platform
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from profiles.errors import MissingExtraError, SketchfleetError
from profiles.events import set_up_logging
from protos.contract import ContractError, Outcome

if TYPE_CHECKING:
    from edge_agent.training.workbench import Workbench

PR_SET_PDEATHSIG = 1  # prctl(2)


def serve(lines: IO[str], events: IO[str], bench: Workbench) -> None:
    """Carries out jobs until "stop" or the end of `lines`; every job ends in a result or error."""
    from edge_agent.training.jobs import run_job
    from edge_agent.training.memory import give_back

    def emit(event: Mapping[str, Any]) -> None:
        events.write(json.dumps(event, separators=(",", ":")) + "\n")
        events.flush()

    for line in lines:
        if not line.strip():
            continue
        try:
            plain = _parse(line)
            if plain.get("job") == "stop":
                return
            run_job(plain, bench, emit)
        except Exception as error:  # noqa: BLE001 - the process outlives any job
            emit(describe(error))
            if not isinstance(error, SketchfleetError):
                traceback.print_exc()
        give_back()


def _parse(line: str) -> dict[str, Any]:
    try:
        plain = json.loads(line)
    except ValueError as error:
        raise ContractError("a job was not valid JSON on one line") from error
    if not isinstance(plain, dict):
        raise ContractError("a job is a JSON object on one line")
    return plain


def describe(error: BaseException) -> dict[str, str]:
    """The error event of a failed job.

    A named error speaks for itself. Of any other only the type and place are told: its text may
    quote local code or paths, and the event travels; standard error keeps the traceback.
    """
    from edge_agent.training.branches import SliceError
    from edge_agent.training.documents import CorpusError
    from edge_agent.training.memory import is_out_of_memory, what_it_means
    from edge_agent.training.workbench import BaseMismatchError, NoDataError

    if is_out_of_memory(error):
        if isinstance(error, SketchfleetError):
            return _error_event("out_of_memory", str(error))
        meant = what_it_means(error) or "a smaller task may fit"
        return _error_event("out_of_memory", f"memory ran out during the job; {meant}")
    if not isinstance(error, SketchfleetError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}:{last.lineno}"  # noqa: PTH119
        return _error_event(
            "crashed", f"{type(error).__name__} at {place}; the trainer's log has the traceback"
        )
    if isinstance(error, (CorpusError, NoDataError)):
        return _error_event("no_data", str(error))
    if isinstance(error, (BaseMismatchError, SliceError)):
        return _error_event("base_mismatch", str(error))
    return _error_event("crashed", str(error))


def _error_event(outcome: Outcome, message: str) -> dict[str, str]:
    return {"event": "error", "outcome": outcome, "message": message}


def _reserve_stdout() -> IO[str]:
    """Standard output for events alone; everything else that writes to it gets standard error."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return events


def _settle_environment() -> None:
    """What must be set before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin starve others
    os.environ["HF_HUB_OFFLINE"] = "1"  # bases are local; nothing here uses the network
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable products
    # Says on import that it found no optional kernel; the log is for what went wrong.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if "tegra" in platform.release():
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            if "expandable_segments" in os.environ.get(name, ""):
                del os.environ[name]  # fails there with "out of memory" at the first megabyte


def _end_with_the_agent(agent: int | None) -> None:
    """Has the kernel end this process when the one that started it ends, however that ends.

    Otherwise a killed agent leaves a trainer that holds its memory until the job is done. Ends at
    once when the starter is gone already. Linux only; elsewhere the end of input has to do.
    """
    if sys.platform != "linux":
        return
    starter = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Process 1 takes over orphans; in a container it may be the agent itself.
    adopted = starter == 1 and agent not in (None, 1)
    if adopted or os.getppid() != starter:
        sys.exit("the agent is gone; the trainer ends too")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="trainer", description="the agent's trainer process")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--agent", type=int, default=None, help="process id of the agent")
    options = parser.parse_args(arguments)
    _end_with_the_agent(options.agent)
    events = _reserve_stdout()
    set_up_logging()
    _settle_environment()
    try:
        import torch

        from edge_agent.training.workbench import Workbench
    except ImportError as error:
        missing = MissingExtraError(error.name or "torch", "train")
        events.write(json.dumps(_error_event("crashed", str(missing))) + "\n")
        events.flush()
        return 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    serve(sys.stdin, events, Workbench())
    return 0


if __name__ == "__main__":
    sys.exit(main())
