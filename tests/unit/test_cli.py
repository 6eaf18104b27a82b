"""What the verbs share: wrong flags get a hint, errors a sentence and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nuciseg.cli import Parser, run_verb
from nuciseg.config import add_config_flags
from nuciseg.errors import CheckpointError, DataError, NonFiniteLossError


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("the folder is empty; fill it"), 2, "nuciseg: the folder is empty; fill it\n"),
        (CheckpointError("truncated"), 2, "nuciseg: truncated\n"),
        (NonFiniteLossError("the loss is NaN"), 1, "nuciseg: the loss is NaN\n"),
        (KeyboardInterrupt(), 130, "nuciseg: interrupted; what was finished is kept\n"),
    ],
)
def test_an_error_becomes_one_sentence_and_an_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_verb(raising(error))
    assert exit_.value.code == code
    assert capsys.readouterr().err == said


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_verb(raising(ZeroDivisionError()))


def test_success_exits_with_0() -> None:
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: None)
    assert exit_.value.code == 0


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8:strict", b"z\\udce9ro \xc3\xa9"),
        ("ascii:strict", b"z\\udce9ro \\xe9"),
        ("utf-8:surrogateescape", b"z\xe9ro \xc3\xa9"),
    ],
)
def test_a_file_name_that_is_no_text_can_be_printed(encoding: str, said: bytes) -> None:
    code = r"from nuciseg.cli import run_verb; run_verb(lambda: print('z\udce9ro \xe9'))"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


def test_a_reader_that_has_seen_enough_ends_the_verb_quietly() -> None:
    code = "from nuciseg.cli import run_verb; run_verb(lambda: [print(line) for line in range(100_000)])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as verb:
        assert verb.stdout is not None
        assert verb.stderr is not None
        verb.stdout.readline()
        verb.stdout.close()
        assert verb.stderr.read() == b""
    assert verb.returncode == 141


def test_another_broken_pipe_is_a_mistake_of_ours() -> None:
    with pytest.raises(BrokenPipeError):
        run_verb(raising(BrokenPipeError()))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--optim.lrr", "1"], "unknown argument '--optim.lrr'; did you mean '--optim.lr'?"),
        (["--nothing_like_it", "1"], "unknown argument '--nothing_like_it'"),
        (["--optim.l", "1"], "did you mean '--optim.lr'?"),  # no abbreviations: they would break with a new key
    ],
)
def test_an_unknown_flag_gets_the_nearest_one(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser("train", "what it does")
    add_config_flags(parser)
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(arguments)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert hint in said
    assert said.count("\n") == 1


def test_a_wrong_value_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("evaluate", "what it does")
    parser.add_argument("--split", choices=("test", "train"))
    parser.add_argument("--out", type=Path)
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(["--split", "tset"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
