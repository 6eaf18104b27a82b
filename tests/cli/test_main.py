"""`python -m nuciseg` and the console script: the verbs listed, found and passed their arguments."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from nuciseg.__main__ import VERBS


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def module(*words: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "nuciseg", *words)


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_the_verbs_are_listed_at_once(words: tuple[str, ...]) -> None:
    result = run(sys.executable, "-X", "importtime", "-m", "nuciseg", *words)
    assert result.returncode == 0
    assert "torch" not in result.stderr, "importing it takes seconds"
    for verb, what in VERBS.items():
        (line,) = (line for line in result.stdout.splitlines() if f"python -m nuciseg.{verb} " in line)
        assert what in line


@pytest.mark.parametrize(
    ("word", "hint"), [("evalute", "did you mean 'evaluate'?"), ("xyz", f"choose one of {', '.join(VERBS)}")]
)
def test_an_unknown_verb_gets_a_hint(word: str, hint: str) -> None:
    result = module(word)
    assert result.returncode == 2
    assert result.stderr == f"nuciseg: there is no verb '{word}'; {hint}\n"
    assert result.stdout == ""


def test_the_console_script_passes_on_the_arguments_and_the_exit_code(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "nuciseg"
    if not script.exists():
        pytest.skip("nuciseg is not installed in this environment")
    helped = run(str(script), "predict", "--help")
    assert helped.returncode == 0
    assert "--checkpoint PATH" in helped.stdout
    failed = run(str(script), "evaluate", "--checkpoint", str(tmp_path / "none"))
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"nuciseg: {tmp_path / 'none'} does not exist; give a run's folder, ")
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_of_each_verb_shows_defaults(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"nuciseg.{verb}").main(["--help"])
    assert exit_.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"usage: python -m nuciseg.{verb} ")
    assert "default: " in said


@pytest.mark.parametrize("verb", ["explore", "evaluate", "predict", "cut"])
def test_help_answers_before_torch_is_imported(verb: str) -> None:
    code = f"import sys; from nuciseg.{verb} import _parser; _parser().format_help(); print('torch' in sys.modules)"
    result = run(sys.executable, "-c", code)
    assert result.stdout.strip() == "False", result.stderr
