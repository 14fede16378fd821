"""Reads the commands and files that a page of the documentation tells people to use.

A fenced block of the language `console` holds commands, each after `$ `, continued after `> `;
other lines are what they print. `title="..."` says on which machine. A block of another language
with a title is a file of that name. `<!-- do: ... -->` is what people do with their hands.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STEP = re.compile(
    r"^(?P<fence>`{3,})[ \t]*(?P<language>[\w-]*)(?P<info>[^\n]*)\n"
    r"(?P<content>.*?)^(?P=fence)[ \t]*$"
    r"|^<!-- do: (?P<action>[^\n]*) -->$",
    re.DOTALL | re.MULTILINE,
)
_TITLE = re.compile(r'title="([^"]*)"')
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=\S*")
_BEFORE_COMMANDS = {"sudo", "exec", "time", "if", "while", "until", "do", "then", "!"}


@dataclass(frozen=True)
class Step:
    """One thing that the page asks for."""

    line: int
    kind: str  # "commands", "file", "action" or "other"
    where: str  # the block's title: a machine, or a file's name; the language of "other"
    text: str

    @property
    def commands(self) -> list[str]:
        """What stands after the prompts, one string for each; line breaks within stay."""
        found: list[str] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append(line[2:])
            elif line.startswith("> ") and found:
                found[-1] += f"\n{line[2:]}"
        return found


def steps(page: Path) -> list[Step]:
    """What a page asks for, in order."""
    text = page.read_text()
    found = []
    for match in _STEP.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["action"] is not None:
            found.append(Step(line, "action", "", match["action"]))
            continue
        title = _TITLE.search(match["info"])
        language, where = match["language"], title[1] if title else ""
        kind = "commands" if language == "console" else "file" if title else "other"
        found.append(Step(line, kind, where or language, match["content"]))
    return found


def script(found: list[Step]) -> str:
    """Bash that writes the files and runs the commands of a page, telling each before it runs."""
    lines = ["set -e -o pipefail"]
    for step in found:
        if step.kind == "file":
            lines.append(file_script(step.where, step.text))
        elif step.kind == "commands":
            for command in step.commands:
                lines += [f"printf '%s\\n' {shlex.quote(f'$ {command}')}", command]
    return "\n".join(lines) + "\n"


def file_script(name: str, text: str) -> str:
    """Bash that writes a file."""
    return f"cat > {shlex.quote(name)} <<'END_OF_FILE'\n{text}END_OF_FILE"


def programs(text: str, names: frozenset[str]) -> Iterator[list[str]]:
    """Command lines of the named programs in a shell text, each with its words.

    Comments, redirections and what surrounds them are taken off.
    """
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            continue  # prose with an apostrophe
        for command in _split(words):
            first = next((i for i, word in enumerate(command) if not _precedes(word)), len(command))
            for start in (first, _after_runuser(command)):
                program = Path(command[start]).name if start < len(command) else ""
                if program in names:
                    yield [program, *command[start + 1 :]]
                    break


def _precedes(word: str) -> bool:
    return word in _BEFORE_COMMANDS or _ASSIGNMENT.fullmatch(word) is not None


def _after_runuser(command: list[str]) -> int:
    """Where the command begins that `runuser -u NAME --` runs."""
    return command.index("--") + 1 if command[:1] == ["runuser"] and "--" in command else 0


def _split(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif set(word) <= set("<>&|;()"):
            skip = word in ("<", ">", ">>", ">&", "&>")
            if command and word not in ("<", ">", ">>", ">&", "&>"):
                yield command
                command = []
            elif skip and command and command[-1] in ("1", "2"):
                command = command[:-1]
        else:
            command.append(word)
    if command:
        yield command
