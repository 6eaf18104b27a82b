"""What all verbs share: a parser that suggests, and errors as one sentence with an exit code."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from nuciseg.buckets import location
from nuciseg.errors import NucisegError
from nuciseg.startup import imports_are_done, imports_begin

INTERRUPTED = 130  # as shells have it: 128 + SIGINT
UNHEARD = 141  # 128 + SIGPIPE


class Parser(argparse.ArgumentParser):
    """argparse that names the nearest flag for one it does not know."""

    def __init__(self, verb: str, description: str, usage: str | None = None) -> None:
        super().__init__(
            prog=f"python -m nuciseg.{verb}",
            usage=usage or "%(prog)s [--config FILE] [--section.key value ...]",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: object = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = super().parse_known_args(args)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"unknown argument {flag!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help"))
        return parsed

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(NucisegError.exit_code)


def folder_or_bucket(text: str) -> Path | str:
    """The type of an argument that names a folder, or one in a bucket."""
    try:
        return location(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def run_verb(main: Callable[[], None]) -> NoReturn:
    """Run a verb: a user's error is printed as one sentence, any other keeps its traceback.

    Nothing calls home: usage reports and update checks are off before any library is imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: a file name need not be text
    imports_begin()
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
            imports_are_done()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it ends
        sys.exit(UNHEARD)
    except NucisegError as error:
        print(f"nuciseg: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("nuciseg: interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(0)


def _reader_is_gone() -> bool:
    """Whether what reads our output has ended, as `head` does when it has its lines."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))
