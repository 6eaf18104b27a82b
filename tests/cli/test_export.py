"""`export`: the shipped weights as ONNX and as a bioimage.io package, and a sentence for what cannot be done."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import pytest

from nuciseg.cli import run_verb
from nuciseg.engine.model_zoo import require_model_zoo_packages
from nuciseg.errors import ResourceError
from nuciseg.export import main


def export(*words: str | Path) -> int:
    """The exit code of the verb, in this process: importing torch once more takes seconds."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


def test_the_shipped_weights_as_onnx(tmp_path: Path) -> None:
    out = tmp_path / "new" / "separator.onnx"
    command = [sys.executable, "-m", "nuciseg.export", "nuciseg/separator", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    first, second = result.stdout.splitlines()
    assert first.startswith("ONNX, opset 17: probabilities differ from PyTorch's by ")
    assert second.startswith(f"written to {out}, 4.3 MB (checkpoint ")
    assert {each.key for each in onnx.load(out).metadata_props} >= {"stride", "map_names", "normalization", "decode"}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.slow
def test_the_shipped_weights_as_a_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        require_model_zoo_packages()
    except ResourceError as error:
        pytest.skip(str(error))
    out = tmp_path / "separator.zip"
    assert export("nuciseg/separator", "--format", "bioimageio", "--out", out) == 0
    said = capsys.readouterr()
    assert "bioimage.io test: passed (" in said.out
    assert "beware: zeroed background" in said.out
    assert said.err == ""
    with zipfile.ZipFile(out) as package:
        description, readme = package.read("rdf.yaml").decode(), package.read("README.md").decode()
    assert "license: BSD-3-Clause" in description
    assert "- name: nuciseg contributors" in description
    assert readme.startswith("# nuciseg/separator")
    assert "## This package" in readme
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("checkpoint", "out", "flags", "message"),
    [
        ("nuciseg/none", "a.onnx", [], "no weights called nuciseg/none come with nuciseg"),
        ("missing", "a.onnx", [], "missing does not exist; give a run's folder"),
        ("nuciseg/separator", "folder", [], "is a folder; name a file in it, as "),
        ("nuciseg/separator", "a.zip", [], "does not end in .onnx, as files of --format onnx do"),
        ("nuciseg/separator", "a.onnx", ["--format", "bioimageio"], "does not end in .zip"),
        ("nuciseg/separator", "file/a.onnx", [], "file cannot be written ("),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    checkpoint: str, out: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("no folder")
    assert export(checkpoint, "--out", tmp_path / out, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("nuciseg: ")
    assert said.count("\n") == 1
    assert message in said
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "file"}


def test_missing_packages_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bioimageio.core", None)
    assert export("nuciseg/separator", "--format", "bioimageio", "--out", tmp_path / "a.zip") == 2
    said = capsys.readouterr().err
    assert said == "nuciseg: export needs bioimageio.core: pip install 'nuciseg[export]'\n"
    assert not list(tmp_path.iterdir())
