"""`evaluate` and `predict` with weights that come with the package, and `scripts/ship.py` that puts them there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from shipped_runs import WORDS, EvaluatedRun, make_evaluated_run
from wandb_offline import read_offline_runs

from nuciseg import evaluate, predict
from nuciseg.cli import run_verb
from nuciseg.engine import shipped
from nuciseg.reporting.shipping import ship

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedRun:
    return make_evaluated_run(tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def tiny(evaluated: EvaluatedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of nuciseg/tiny; the current folder is an empty one."""
    monkeypatch.setattr(shipped, "SHIPPED_DIR", tmp_path / "installed" / "nuciseg" / "shipped")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return ship(evaluated.folder, "tiny", evaluated.sources)


def run(main: Callable[[list[str]], None], *words: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_by_name_is_the_runs_own_and_goes_to_the_current_folder(
    tiny: Path, evaluated: EvaluatedRun, split: str
) -> None:
    before = snapshot(tiny)
    words = ["--checkpoint", "nuciseg/tiny", "--data.root", evaluated.data_root, "--split", split]
    assert run(evaluate.main, *words, "--tracking.kind", "offline") == 0
    out = Path(f"evaluation-tiny-{split}")
    report, own = (
        json.loads((folder / "scores.json").read_text()) for folder in (out, evaluated.folder / f"evaluation-{split}")
    )
    assert report | {"checkpoint": own["checkpoint"]} == own
    assert [path.name for path in Path.cwd().iterdir()] == [out.name]
    assert snapshot(tiny) == before, "nothing was written into the package"
    (logged,) = read_offline_runs(out)
    assert (logged.run["group"], logged.run["job_type"]) == ("tiny", "evaluate")


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (folder, *sorted(folder.rglob("*")))}


def test_by_its_path_it_is_no_less_the_packages(tiny: Path, evaluated: EvaluatedRun) -> None:
    before = snapshot(tiny)
    words = ["--checkpoint", tiny, "--data.root", evaluated.data_root, "--tracking.kind", "none"]
    assert run(evaluate.main, *words) == 0
    assert Path("evaluation-tiny-test", "scores.json").exists()
    assert snapshot(tiny) == before


def test_an_evaluation_without_images_is_one_sentence(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(evaluate.main, "--checkpoint", "nuciseg/tiny") == 2
    said = capsys.readouterr().err
    assert said == "nuciseg: nuciseg/tiny comes without images; give the folder of yours with --data.root DIR\n"
    assert not list(Path.cwd().iterdir())


def test_the_images_it_was_trained_on_are_no_test(
    tiny: Path, evaluated: EvaluatedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without parts serves as any; that these are the training images, only their names tell here."""
    shutil.copytree(evaluated.data_root / "train", tmp_path / "whole")
    words = ["--checkpoint", "nuciseg/tiny", "--data.root", tmp_path / "whole"]
    assert run(evaluate.main, *words) == 2
    assert "was trained on the very images" in capsys.readouterr().err
    assert run(evaluate.main, *words, "--split", "validation", "--tracking.kind", "none") == 0


def test_predict_by_name(tiny: Path, evaluated: EvaluatedRun) -> None:
    images = evaluated.data_root / "test"
    for name, out in (("nuciseg/tiny", "by name"), (evaluated.folder, "by path")):
        assert run(predict.main, "--checkpoint", name, images, "--out", out) == 0
    labels = sorted(Path("by name").glob("*_masks.tif"))
    assert len(labels) == 3
    assert all(path.read_bytes() == Path("by path", path.name).read_bytes() for path in labels)


@pytest.mark.parametrize("verb", [evaluate, predict])
def test_an_unknown_name_is_one_sentence_and_help_names_those_there_are(
    tiny: Path, evaluated: EvaluatedRun, verb: object, capsys: pytest.CaptureFixture[str]
) -> None:
    main: Callable[[list[str]], None] = verb.main  # type: ignore[attr-defined]
    words = ["--data.root"] if verb is evaluate else []
    assert run(main, "--checkpoint", "nuciseg/foo", *words, evaluated.data_root / "test") == 2
    said = capsys.readouterr().err
    assert "nuciseg: no weights called nuciseg/foo come with nuciseg; " in said
    assert "nuciseg/tiny" in said
    assert said.count("\n") == 1
    assert run(main, "--help") == 0
    assert "nuciseg/tiny" in " ".join(capsys.readouterr().out.split())


def test_the_command_ships_and_refuses(evaluated: EvaluatedRun, tmp_path: Path) -> None:
    """In a copy of the repository, because it writes into the package."""
    shutil.copytree(ROOT / "nuciseg", tmp_path / "nuciseg", ignore=shutil.ignore_patterns("__pycache__", "shipped"))
    sources = ["--recipe", str(evaluated.sources.recipe), "--words", str(WORDS)]

    def command(checkpoint: Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(ROOT / "scripts" / "ship.py"), str(checkpoint), "tiny", *sources]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    result = command(tmp_path / "missing")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("nuciseg: ")
    assert result.stderr.count("\n") == 1
    result = command(evaluated.folder)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "nuciseg" / "shipped" / "tiny"
    assert f"written to {folder}" in result.stdout
    assert (folder / "README.md").read_text().startswith("# nuciseg/tiny\n")
