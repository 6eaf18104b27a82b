"""The comment at the top of a search's YAML: its question is read, its answer is written.

# Question   How much ...?
#            (goes on where lines are indented)
# Command    python -m nuciseg.tune --config tune_configs/study/NAME.yaml --data.root DIR
# Takes      9 minutes on 2 cores
# Arms       none; flips alone; all (names for the arms, where their settings are no good ones)
# Answer     what the figures say
search: ...
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nuciseg.errors import ConfigError
from nuciseg.images import write_bytes

LINE_LENGTH = 120
_LABEL = re.compile(r"# ([A-Z][a-z]+) {2,}(\S.*?)\s*")
_CONTINUED = re.compile(r"# {3,}(\S.*?)\s*")
_INDENT = len("# Question   ")
ANSWER = "Answer"


@dataclass(frozen=True)
class Question:
    """What one search asks. `command` has one line a command; `takes` and `arms` are empty where the header says
    nothing of them."""

    name: str
    path: Path
    text: str
    command: tuple[str, ...]
    takes: str
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Field:
    """One entry of a header: its lines in the file are `start` to `stop`, excluded."""

    label: str
    lines: tuple[str, ...]
    start: int
    stop: int


def find_questions(names: Sequence[str], folder: Path) -> dict[str, Question]:
    """The question of each name, from NAME.yaml in `folder` or a folder inside it.

    Raises ConfigError where there is none, more than one, or one whose header asks nothing.
    """
    if not folder.is_dir():
        raise ConfigError(f"--questions {folder} is no folder; give the one that holds the searches' YAML files")
    by_name: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        by_name.setdefault(path.stem, []).append(path)
    return {name: _read_question(name, by_name.get(name, []), folder) for name in names}


def write_answer(question: Question, answer: str) -> bool:
    """Put `answer` into the header, every other byte left as it is; whether that changed the file.

    Raises ResourceError where the file cannot be written.
    """
    lines = _read_lines(question.path)
    fields = _fields(lines)
    end = "\r" if lines[fields[0].start].endswith("\r") else ""
    wrapped = textwrap.wrap(answer, LINE_LENGTH - _INDENT, break_long_words=False, break_on_hyphens=False)
    labels = [f"# {ANSWER}".ljust(_INDENT), *["#".ljust(_INDENT)] * (len(wrapped) - 1)]
    new = [f"{label}{line}{end}" for label, line in zip(labels, wrapped, strict=True)]
    before = next((field for field in fields if field.label == ANSWER), None)
    start, stop = (before.start, before.stop) if before is not None else (fields[-1].stop, fields[-1].stop)
    if lines[start:stop] == new:
        return False
    write_bytes(question.path, "\n".join([*lines[:start], *new, *lines[stop:]]).encode())
    return True


def _read_question(name: str, paths: Sequence[Path], folder: Path) -> Question:
    if not paths:
        raise ConfigError(f"there is no {name}.yaml in {folder} or a folder inside it: a record without its question")
    if len(paths) > 1:
        raise ConfigError(f"{paths[0]} and {paths[1]} are both the question of the record {name}; rename one")
    fields = {field.label: field.lines for field in _fields(_read_lines(paths[0]))}
    if "Question" not in fields:
        raise ConfigError(f"{paths[0]} does not say what it asks; begin it with a line '# Question   How much ...?'")
    text, takes, arms = (" ".join(fields.get(label, ())) for label in ("Question", "Takes", "Arms"))
    names = tuple(name.strip() for name in arms.split(";")) if arms else ()
    return Question(name, paths[0], text, fields.get("Command", ()), takes, names)


def _read_lines(path: Path) -> list[str]:
    """Split at line feeds alone, so that joined they are the file again, byte for byte."""
    try:
        return path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}); restore it") from None


def _fields(lines: Sequence[str]) -> list[_Field]:
    """The entries of the comment that a file begins with."""
    fields: list[_Field] = []
    for at, line in enumerate(lines):
        if not line.startswith("#"):
            break
        label, continued = _LABEL.fullmatch(line), _CONTINUED.fullmatch(line)
        if label is not None:
            fields.append(_Field(label[1], (label[2],), at, at + 1))
        elif continued is not None and fields and fields[-1].stop == at:
            last = fields[-1]
            fields[-1] = _Field(last.label, (*last.lines, continued[1]), last.start, at + 1)
    return fields
