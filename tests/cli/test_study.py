"""`study`: from the folders of searches to page, picture and answers, and a sentence for what cannot be used."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_studies import HEADER, SIX_TRIALS, write_grid, write_question

from nuciseg.cli import run_verb
from nuciseg.study import main

ANSWER = (
    "# Answer     Best is adam with 8.3 of 10 clusters on average (8 to 9); its worst seed separates more than the "
    "best of\n#            sgd (5.3, 5 to 6).\n"
)


def study(*words: str | Path) -> int:
    """The exit code of the verb, in this process: importing torch once more takes seconds."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: two searches, of which one is not finished, and the questions of both."""
    monkeypatch.chdir(tmp_path)
    for name in ("optimizer", "later"):
        write_question(tmp_path / "tune_configs" / "study", name)
        shutil.copy(tmp_path / "tune_configs" / "study" / f"{name}.yaml", tmp_path)
        (tmp_path / "searches").mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").rename(tmp_path / "searches" / f"{name}.yaml")
    write_grid(tmp_path / "searches" / "optimizer", SIX_TRIALS)
    write_grid(tmp_path / "searches" / "later", SIX_TRIALS[:1], ranked=False)
    return tmp_path


def test_finished_searches_become_a_page_and_answers(place: Path) -> None:
    command = [sys.executable, "-m", "nuciseg.study", "searches"]
    result = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "not finished, so left out: searches/later; if it is not running, go on with: "
        "python -m nuciseg.tune --resume searches/later",
        "record: docs/study/optimizer.json",
        "answer: tune_configs/study/optimizer.yaml",
        "study:  docs/study.md",
    ]
    assert set(files_below(place / "docs")) == {"study.md", "study/optimizer.json", "images/study.png"}
    assert "8.3 of 10 clusters" in (place / "docs" / "study.md").read_text()
    assert (place / "tune_configs" / "study" / "optimizer.yaml").read_text().startswith(HEADER + ANSWER)
    assert ANSWER not in (place / "tune_configs" / "study" / "later.yaml").read_text()


def test_the_page_is_made_again_of_what_is_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study("searches") == 0
    before = files_below(place / "docs"), files_below(place / "tune_configs")
    shutil.rmtree(place / "searches")
    (place / "docs" / "study.md").write_text("by hand")
    capsys.readouterr()
    assert study() == 0
    assert (files_below(place / "docs"), files_below(place / "tune_configs")) == before
    assert capsys.readouterr().out == "study:  docs/study.md\n", "no record and no answer changed"


def test_a_study_goes_where_it_is_told(place: Path) -> None:
    shutil.copytree(place / "tune_configs", place / "questions")
    assert study("searches/optimizer", "--out", "elsewhere", "--questions", "questions") == 0
    assert (place / "elsewhere" / "study.md").exists()
    assert not (place / "docs").exists()
    assert ANSWER in (place / "questions" / "study" / "optimizer.yaml").read_text()
    assert ANSWER not in (place / "tune_configs" / "study" / "optimizer.yaml").read_text()


def test_without_any_record_the_page_says_how_it_is_made(place: Path) -> None:
    assert study() == 0
    text = (place / "docs" / "study.md").read_text()
    assert "python -m nuciseg.study SEARCHES" in text
    assert "images/study.png" not in text, "there is none"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "nowhere is no folder"),
        (("searches", "docs"), "docs is no folder"),
        (("tune_configs",), "tune_configs holds no run and no search"),
        (("tune_configs/study",), "tune_configs/study holds no search that has begun"),
        (("searches/optimizer/trial00",), "searches/optimizer/trial00 holds a run, not a search"),
        (("searches", "--questions", "nowhere"), "--questions nowhere is no folder"),
        (("searches", "--questions", "empty"), "there is no optimizer.yaml in empty"),
        (("searches", "--out", "file"), "file/study/optimizer.json cannot be written"),
        (("--final", "searches"), "searches holds no scores.json"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(
    words: tuple[str, ...], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").write_text("")
    (place / "empty").mkdir()
    assert study(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nuciseg: {said}")
    assert error.count("\n") == 1
    assert not (place / "docs").exists()


def test_a_question_that_asks_nothing_is_named_before_anything_is_written(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_question(place / "tune_configs" / "study", "optimizer", "# Command    none\n")
    assert study("searches") == 2
    assert "tune_configs/study/optimizer.yaml does not say what it asks" in capsys.readouterr().err
    assert not (place / "docs").exists()


def test_the_recommended_model_is_quoted_from_a_real_evaluation(place: Path, tiny_checkpoint: Path) -> None:
    from nuciseg.engine.evaluation import evaluate_checkpoint
    from nuciseg.engine.precision import local_device

    result = evaluate_checkpoint(tiny_checkpoint, None, "test", place / "evaluation", device=local_device())
    assert study("--final", "evaluation") == 0
    kept = json.loads((place / "docs" / "study" / "final.json").read_text())
    assert kept["checkpoint"] == f"tiny/checkpoints/{tiny_checkpoint.name}"
    assert kept["figures"]["clusters_separated"] == result.scores.clusters_separated
    text = (place / "docs" / "study.md").read_text()
    assert f"It separates {result.scores.clusters_separated} of {result.scores.clusters} test clusters" in text
    assert str(tiny_checkpoint.parent.parent.parent) not in text + json.dumps(kept)
    assert study("searches/optimizer") == 0
    assert "## The recommended model" in (place / "docs" / "study.md").read_text(), "it stays"


def test_weights_that_come_with_nuciseg_are_quoted_by_their_name(place: Path, tiny_checkpoint: Path) -> None:
    from nuciseg.engine.evaluation import evaluate_checkpoint
    from nuciseg.engine.precision import local_device
    from nuciseg.engine.shipped import SHIPPED_DIR

    evaluate_checkpoint(tiny_checkpoint, None, "test", place / "evaluation", device=local_device())
    scores = place / "evaluation" / "scores.json"
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"checkpoint": str(SHIPPED_DIR / "separator")}))
    assert study("--final", "evaluation") == 0
    assert json.loads((place / "docs" / "study" / "final.json").read_text())["checkpoint"] == "nuciseg/separator"


def test_the_header_names_the_arms_and_the_record_keeps_the_names(place: Path) -> None:
    study("searches")
    question = place / "tune_configs" / "study" / "optimizer.yaml"
    header = question.read_text()
    question.write_text(header.replace("# Answer", "# Arms       ADAM; stochastic\n# Answer"))
    study()  # nothing but the names changed
    assert "| ADAM | " in (place / "docs" / "study.md").read_text()
    assert "# Answer     Best is ADAM with" in question.read_text()
    assert json.loads((place / "docs" / "study" / "optimizer.json").read_text())["arm_names"] == ["ADAM", "stochastic"]


def test_names_for_more_arms_than_there_are_change_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study("searches")
    question = place / "tune_configs" / "study" / "optimizer.yaml"
    question.write_text(question.read_text().replace("# Answer", "# Arms       a; b; c\n# Answer"))
    before = files_below(place)
    assert study() == 2
    assert "header of optimizer.yaml names 3 arms (a; b; c), but the search has 2" in capsys.readouterr().err
    assert files_below(place) == before
