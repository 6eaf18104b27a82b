"""Several searches in one `tune`: each in its folder, all in one group, resumed where they were."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import SMALL

from nuciseg.config import load_config, merged
from nuciseg.distributed.twins import TWIN_FILE
from nuciseg.engine.checkpoint import find_checkpoint, load_checkpoint
from nuciseg.errors import ConfigError
from nuciseg.report import main as report
from nuciseg.tracking import read_identity
from nuciseg.tune import config_files, describe_arms


def question(key: str, *values: object) -> dict[str, object]:
    search = {"sampler": "grid", "scheduler": "none", "final": False, "space": {key: {"choice": list(values)}}}
    return merged(SMALL, {"train": {"epochs": 1}, "search": search})


def tune(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nuciseg.tune", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    (folder / "q").mkdir()
    (folder / "q" / "rates.yaml").write_text(yaml.safe_dump(question("optim.lr", 0.05, 0.01)))
    (folder / "q" / "seeds.yaml").write_text(yaml.safe_dump(question("seed", 0)))
    (folder / "q" / "slower.yaml").write_text(yaml.safe_dump(question("optim.lr", 0.01, 0.005)))
    return folder


@pytest.fixture(scope="module")
def searched(questions: Path) -> str:
    done = tune(questions, "--config", "q", "--run.name", "both", "--tracking.kind", "offline")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_each_file_is_searched_in_its_own_folder_and_all_in_one_group(questions: Path, searched: str) -> None:
    folder = questions / "runs" / "both"
    for name, num_trials in (("rates", 2), ("seeds", 1), ("slower", 2)):
        trials = json.loads((folder / name / "results.json").read_text())
        assert len(trials) == num_trials
        assert all(trial["failure"] is None for trial in trials)
        for trial in trials:
            identity = read_identity(folder / name / trial["id"])
            assert identity is not None
            assert identity.group == "both"
    assert searched.index("rates, search 1 of 3") < searched.index("seeds, search 2 of 3")
    assert "differs: optim.lr; same: images, split 0, 1 epochs, seed 0" in searched
    assert "differs: seed; same: images, split 0, 1 epochs\n" in searched
    assert f"all 3 searches: {Path('runs') / 'both'}" in searched


@pytest.mark.slow
def test_the_report_of_the_folder_shows_every_search(questions: Path, searched: str) -> None:
    folder = questions / "runs" / "both"
    report([str(folder)])
    page = (folder / "report.html").read_text()
    assert all(f"<h2>{name}: trials</h2>" in page for name in ("rates", "seeds"))


@pytest.mark.slow
def test_a_trial_that_another_search_has_trained_is_taken_over(questions: Path, searched: str) -> None:
    folder = questions / "runs" / "both"
    trained, taken = (
        {trial["sample"]["optim.lr"]: trial for trial in json.loads((folder / name / "results.json").read_text())}
        for name in ("rates", "slower")
    )
    twin, original = folder / "slower" / taken[0.01]["id"], folder / "rates" / trained[0.01]["id"]
    note = json.loads((twin / TWIN_FILE).read_text())
    assert (twin / note["trained_in"]).resolve() == original.resolve()
    assert (twin / "metrics.jsonl").read_text() == (original / "metrics.jsonl").read_text()  # times included
    assert taken[0.01]["score"] == trained[0.01]["score"]
    assert load_checkpoint(find_checkpoint(twin)).scores == load_checkpoint(find_checkpoint(original)).scores
    assert read_identity(twin) == read_identity(original)
    assert load_config(twin / "config.yaml").search == load_config(folder / "slower.yaml").search
    assert not (folder / "slower" / taken[0.005]["id"] / TWIN_FILE).exists()
    assert not (original / TWIN_FILE).exists()


@pytest.mark.slow
def test_what_an_interrupted_sequence_lacks_is_made_up_for(questions: Path, searched: str) -> None:
    folder = questions / "runs" / "both"
    before = (folder / "rates" / "results.json").read_text()
    for path in sorted((folder / "seeds").rglob("*"), reverse=True):  # as if it had been killed before this one
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "seeds").rmdir()
    done = tune(questions, "--resume", "runs/both")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "rates" / "results.json").read_text()) == json.loads(before)
    assert len(json.loads((folder / "seeds" / "results.json").read_text())) == 1


def test_a_mistake_in_the_last_file_is_found_before_the_first_search(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(question("seed", 0)))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(question("optim.rate", 0.1)))
    done = tune(tmp_path, "--config", "a.yaml", "--config", "b.yaml")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "unknown key 'optim.rate'" in line
    assert not (tmp_path / "runs").exists()


def test_files_are_taken_once_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    for name in ("b", "a"):
        (tmp_path / "q" / f"{name}.yaml").write_text("")
    inside = [tmp_path / "q" / "a.yaml", tmp_path / "q" / "b.yaml"]
    assert config_files([tmp_path / "q"]) == inside
    assert config_files([inside[1], tmp_path / "q"]) == [inside[1], inside[0]]
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"would both be searched in a folder a; rename one"):
        config_files([*inside, tmp_path / "a.yaml"])
    (tmp_path / "q" / "b (2).yaml").write_text("")
    with pytest.raises(ConfigError, match=r"b \(2\).yaml: its search would lie in a folder 'b \(2\)'; rename it, with"):
        config_files([tmp_path / "q"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty is a folder without a \.yaml file"):
        config_files([tmp_path / "empty"])


def test_what_is_not_the_same_for_each_trial_is_told() -> None:
    config = load_config(overrides=merged(question("optim.lr", 0.1), {"search": {"scheduler": "asha"}}))
    assert describe_arms(config) == "differs: optim.lr; same: images, split 0, 1 epochs at most (asha decides), seed 0"
    assert "same: images, split held.txt, 1 epochs" in describe_arms(
        config.replaced({"data.validation_list": "lists/held.txt"})
    )
