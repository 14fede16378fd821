"""Problems with tests, in HumanEval's and MBPP's format: what is asked and what must pass.

HumanEval (arXiv 2107.03374) has prompt, entry_point and test; MBPP (arXiv 2108.07732) has text and
test_list. Knows prompts, and where an answer ends. It knows no models and runs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.training.documents import CorpusError
from edge_agent.training.records import jsonl_records

# Where a function's body is over, after the evaluation of arXiv 2107.03374 and bigcode's harness.
HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\nassert", "\n```")
MBPP_STOPS = ("\nclass ", "\nassert", '\n"""', "\nprint", "\nif ", "\n```", "\n<|")


class ProblemError(CorpusError):
    """The problems cannot be used; the message says which file and why."""


@dataclass(frozen=True)
class Problem:
    """What is asked, and what an answer must pass."""

    name: str
    prompt: str
    tests: str  # a program that fails by an exception
    continues: bool  # whether the prompt is the beginning of the program
    stops: tuple[str, ...]
    reference: str  # a completion that passes; "" when the file gives none

    def program(self, completion: str) -> str:
        """The whole program of one answer."""
        return self.prompt + completion if self.continues else completion


def read_problems(path: Path, most: int | None = None) -> Iterator[Problem]:
    """The problems of a JSONL file (also .gz, .bz2, .xz), at most `most`, in their order.

    Raises `CorpusError` on a file that is not JSONL or a problem in neither format.
    """
    for number, (where, values) in enumerate(jsonl_records(path, Counter())):
        if most is not None and number >= most:
            return
        if "entry_point" in values and "test" in values:
            yield _humaneval(values, where)
        elif "test_list" in values:
            yield _mbpp(values, where)
        else:
            has = ", ".join(sorted(values)) or "nothing"
            raise ProblemError(
                f"{where} is no problem: HumanEval's have prompt, entry_point and test, MBPP's "
                f"text and test_list (it has: {has}); check [evaluation] problems"
            )


def _humaneval(values: Mapping[str, Any], where: str) -> Problem:
    entry = _text(values, "entry_point", where)
    if not entry.isidentifier():
        raise ProblemError(f"{where}: entry_point {entry!r} is not the name of a function")
    return Problem(
        name=str(values.get("task_id", where)),
        prompt=_text(values, "prompt", where),
        tests=f"{_text(values, 'test', where)}\ncheck({entry})\n",
        continues=True,
        stops=HUMANEVAL_STOPS,
        reference=str(values.get("canonical_solution") or ""),
    )


def _mbpp(values: Mapping[str, Any], where: str) -> Problem:
    tests = values["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise ProblemError(f"{where}: test_list must be a list of texts, at least one")
    said = _text(values, "text" if "text" in values else "prompt", where).strip()
    before = [values.get("test_setup_code") or "", *(values.get("test_imports") or [])]
    return Problem(
        name=str(values.get("task_id", where)),
        prompt=f'"""\n{said}\n{tests[0]}\n"""\n',
        tests="\n".join([*map(str, before), *tests]) + "\n",
        continues=False,
        stops=MBPP_STOPS,
        reference=str(values.get("code") or ""),
    )


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    found = values.get(key)
    if not isinstance(found, str):
        raise ProblemError(f"{where}: {key!r} must be text; check [evaluation] problems")
    return found.replace("\r\n", "\n")
