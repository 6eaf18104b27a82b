"""`report`: a page of a run that was really trained and evaluated, and a sentence for what is no run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import QUICK_TO_LEARN
from written_runs import write_run

from nuciseg.cli import run_verb
from nuciseg.config import load_config
from nuciseg.distributed.worker import Job, run_worker
from nuciseg.engine.evaluation import evaluate_checkpoint
from nuciseg.engine.inference import Place
from nuciseg.engine.precision import local_device
from nuciseg.report import main
from nuciseg.tracking import RunIdentity


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four epochs on drawn pairs, scored on its validation images."""
    run_dir = tmp_path_factory.mktemp("runs") / "quick"
    config = load_config(overrides=QUICK_TO_LEARN).replaced({"optim.lr": 0.05})
    run_worker(Job(config, run_dir, RunIdentity("quick", "quick", "quick", "train")), Place(), lambda report: None)
    evaluate_checkpoint(run_dir, None, "validation", run_dir / "evaluation-validation", device=local_device())
    return run_dir


def report(*words: str | Path) -> int:
    """The exit code of the verb, in this process: importing torch once more takes seconds."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


def test_a_real_run_becomes_a_page_beside_it(evaluated: Path) -> None:
    command = [sys.executable, "-m", "nuciseg.report", str(evaluated)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"report: {evaluated / 'report.html'}\n"
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    num_pictures = len(list((evaluated / "evaluation-validation" / "overlays").iterdir()))
    assert page.count('src="data:image/png') == min(num_pictures, 12), "the six worst and the six best"
    assert page.count('src="data:image/svg+xml') == 2, "two learning curves"
    assert "drawn border" in page, "the baselines stand beside the network"


def test_the_page_needs_nothing_from_anywhere(evaluated: Path, tmp_path: Path) -> None:
    assert report(evaluated, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(source.startswith(("data:", "#")) for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "<script" not in page


def test_several_runs_are_compared_in_one_page(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", [3, 5])
    monkeypatch.chdir(tmp_path)
    assert report(evaluated, other) == 0
    assert capsys.readouterr().out == "report: report.html\n"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not compared across splits" in page
    assert "Run quick" in page


@pytest.mark.parametrize("words", [("nowhere",), (".",), ("run", "nowhere")])
def test_what_is_no_run_is_refused_in_one_sentence(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", [3])
    monkeypatch.chdir(tmp_path)
    assert report(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nuciseg: {words[-1]} ")
    assert said.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_refused(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert report(evaluated, "--out", tmp_path / "file" / "page.html") == 2
    assert "page.html cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scores.json", "images.csv"])
def test_a_damaged_evaluation_is_named(
    evaluated: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(evaluated, run_dir)
    (run_dir / "evaluation-validation" / name).write_bytes(b"\xff{")
    assert report(run_dir) == 2
    assert f"{name} cannot be read" in capsys.readouterr().err


def test_a_damaged_picture_is_named(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(evaluated, run_dir)
    worst = min((run_dir / "evaluation-validation" / "overlays").iterdir())
    worst.write_bytes(b"no picture")
    assert report(run_dir) == 2
    assert f"{worst.name} cannot be read as a PNG picture" in capsys.readouterr().err
