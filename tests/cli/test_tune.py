"""`tune` as a process with a Ray of its own: what a search prints and leaves, also where trials fail."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_runs import QUICK_TO_LEARN, SMALL, last_checkpoint, logged_epochs, run, small_config

from nuciseg.config import load_config, merged
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.distributed.final import train_final
from nuciseg.distributed.mirror import Mirror
from nuciseg.distributed.trials import Trial
from nuciseg.distributed.worker import FINISHED_FILE
from nuciseg.engine.checkpoint import WEIGHTS_FILE, CheckpointStore, find_checkpoint, load_checkpoint
from nuciseg.errors import DataError, ResourceError
from nuciseg.report import main as report
from nuciseg.tracking import read_identity
from nuciseg.tune import _print_conclusion

GRID = [0.05, 0.01, 90.0]  # the last one explodes
SEARCH = {
    "data": {"synthetic": {"num_train": 60}, "batch_size": 2},
    "augment": {"enabled": False},
    "model": {"dropout": 0.0, "norm": "none"},
    "optim": {"kind": "sgd", "weight_decay": 10.0},
    "schedule": {"kind": "constant", "warmup_share": 0.0},
    "train": {"epochs": 3, "ema_decay": None, "clip_norm": None},
    "search": {
        "sampler": "grid",
        "scheduler": "none",
        "trial_epochs": 2,
        "space": {"optim.lr": {"choice": GRID}},
    },
}


def tune(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nuciseg.tune", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)


def table_rows(said: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder a search was run in, without training its winner to the end, and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "search.yaml").write_text(yaml.safe_dump(merged(SMALL, SEARCH)))
    done = tune(folder, "--config", "search.yaml", "--run.name", "a", "--no-final")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


def test_the_trials_are_ranked_and_the_failed_ones_told_with_their_reason(searched: tuple[Path, str]) -> None:
    folder, said = searched
    trials = json.loads((folder / "runs" / "a" / "results.json").read_text())
    rows = table_rows(said)
    assert [row[1] for row in rows] == [trial["id"] for trial in trials]
    assert [row[2] for row in rows[:2]] == [f"{trial['score']:.3f}" for trial in trials[:2]]
    assert rows[2][2] == "failed"
    assert rows[2][-1] == "lr=90"
    assert "1 of 3 trials failed:" in said
    [reason] = [line for line in said.splitlines() if line.startswith(f"  {trials[2]['id']}: ")]
    assert " is not finite in step " in reason


def test_a_page_of_the_search_shows_its_trials_and_why_one_failed(searched: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = searched
    trials = json.loads((folder / "runs" / "a" / "results.json").read_text())
    report([str(folder / "runs" / "a"), "--out", str(tmp_path / "page.html")])
    page = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert all(f'<td class="word">{trial["id"]}</td>' in page for trial in trials)
    assert f"Trial {trials[2]['id']} failed before its first epoch was over: {trials[2]['failure']}" in page
    assert "2 ran to the end, 0 were stopped early, 1 failed" in page


def test_the_best_configuration_its_checkpoint_and_its_figures_can_be_found(searched: tuple[Path, str]) -> None:
    folder, said = searched
    best = json.loads((folder / "runs" / "a" / "results.json").read_text())[0]
    assert f"optim.lr: {best['sample']['optim.lr']}" in said
    [line] = [line for line in said.splitlines() if line.startswith("configuration of this trial, ")]
    assert "not calibrated" in line
    path = folder / line.rpartition(": ")[2]
    assert load_config(path).optim.lr == best["sample"]["optim.lr"]
    [checkpoint] = [line for line in said.splitlines() if line.startswith("best checkpoint: ")]
    assert (folder / checkpoint.removeprefix("best checkpoint: ") / "weights.safetensors").exists()
    assert not (folder / "runs" / "a" / "final").exists()


def test_progress_is_told_in_plain_lines_without_rays_own(searched: tuple[Path, str]) -> None:
    _, said = searched
    for epoch in (1, 2):
        assert f" running {epoch}/2 " in said
    assert "disk: at most " in said
    for noise in ("(raylet)", "WARNING", "ray.init", "Current time", "╭"):
        assert noise not in said


@pytest.mark.slow
def test_a_finished_search_that_is_resumed_tells_the_same(searched: tuple[Path, str]) -> None:
    folder, said = searched
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs" / "a").glob("*/checkpoints/*/*")}
    done = tune(folder, "--resume", "runs/a", "--no-final")
    assert done.returncode == 0, done.stderr
    assert table_rows(done.stdout) == table_rows(said)
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs" / "a").glob("*/checkpoints/*/*")} == before


def test_that_no_winner_was_trained_can_be_made_up_for(searched: tuple[Path, str]) -> None:
    folder, _ = searched
    assert load_config(folder / "runs" / "a" / "config.yaml").search.final


def test_the_winners_run_is_told_before_it_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = SyntheticConfig(num_train=6, num_test=2, mean_diameter_px=16.0, nuclei_per_cluster=(2, 2))
    write_nucleus_folder(drawn, tmp_path / "clusters")
    settings = {
        "data": {"root": str(tmp_path / "clusters")},
        "train": {"epochs": 1},
        "tracking": {"kind": "offline"},
        "search": {"space": {"optim.lr": {"choice": [0.05]}}},
    }
    config = load_config(overrides=merged(SMALL, settings))
    folder = tmp_path / "runs" / "a"
    trials = [Trial("t", {"optim.lr": 0.05}, score=0.5, tie_break=0.5, epochs=1, seconds=1.0, failure=None)]
    solution = sorted((tmp_path / "clusters" / "test" / "solutions").glob("*.png"))[0]
    saved = solution.read_bytes()
    solution.unlink()
    with pytest.raises(DataError, match=solution.stem):
        _print_conclusion(trials, config, Mirror(folder), final=True, verbose=False)
    said = capsys.readouterr().out
    assert f"best checkpoint: {folder / 'final' / 'checkpoints'}" in said
    assert "winner: W&B offline run, to upload it: wandb sync " in said
    assert f"a page of all this: python -m nuciseg.report {folder}" in said
    [line] = [line for line in said.splitlines() if line.startswith("whole configuration: ")]
    assert load_config(Path(line.removeprefix("whole configuration: "))) == config.replaced({"optim.lr": 0.05})

    solution.write_bytes(saved)
    _print_conclusion(trials, config, Mirror(folder), final=True, verbose=False)
    assert "test: 2 images" in capsys.readouterr().out
    evaluation = read_identity(folder / "final" / "evaluation-test")
    assert evaluation is not None
    assert (evaluation.job_type, evaluation.group) == ("evaluate", "a")


@pytest.mark.slow
def test_the_winner_is_trained_to_the_end_and_evaluated(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(merged(SMALL, SEARCH)))
    words = ("--search.space", json.dumps({"optim.lr": {"choice": [0.05]}}))
    done = tune(tmp_path, "--config", "search.yaml", "--run.name", "a", *words)
    assert done.returncode == 0, done.stderr
    final = tmp_path / "runs" / "a" / "final"
    assert load_config(final / "config.yaml").train.epochs == 3
    [scores] = final.rglob("scores.json")
    report = json.loads(scores.read_text())
    assert report["clusters"] == 2  # the test images, not those of validation
    assert "test: 2 images" in done.stdout


@pytest.mark.slow
def test_a_search_in_which_every_trial_fails_says_so(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(merged(SMALL, SEARCH)))
    words = ("--search.space", json.dumps({"optim.lr": {"choice": [90.0]}}))
    done = tune(tmp_path, "--config", "search.yaml", "--run.name", "a", *words)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("nuciseg: every trial failed")
    assert "1 of 1 trials failed:" in done.stdout


def test_a_winner_that_was_trained_to_the_end_is_only_calibrated(tmp_path: Path) -> None:
    trial = small_config(**{"train.epochs": 2, "train.calibrate": False})
    run(trial, tmp_path / "trial")
    config = trial.replaced({"train.calibrate": True})
    left_over = tmp_path / "final" / ".checkpoints.copy" / "epoch-0001"  # by an attempt that was killed as it copied
    left_over.mkdir(parents=True)
    for _ in range(2):  # the second finds it done
        final = train_final(config, Mirror(tmp_path), Mirror(tmp_path / "trial"), verbose=False).folder
    assert last_checkpoint(final).progress == last_checkpoint(tmp_path / "trial").progress
    assert not left_over.exists()
    assert logged_epochs(final) == [1, 2]
    assert load_config(final / "config.yaml").train.calibrate
    assert (final / FINISHED_FILE).exists()

    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        train_final(config, Mirror(tmp_path / "file"), Mirror(tmp_path / "trial"), verbose=False)

    longer = config.replaced({"train.epochs": 3})
    final = train_final(longer, Mirror(tmp_path / "longer"), Mirror(tmp_path / "trial"), verbose=False).folder
    assert logged_epochs(final) == [1, 2, 3]
    trained, taken = (last_checkpoint(folder).progress.history[0]["train_s"] for folder in (final, tmp_path / "trial"))
    assert trained != taken, "a schedule of other length is begun anew"


def test_the_last_epoch_is_taken_where_it_is_better_once_both_are_calibrated(tmp_path: Path) -> None:
    changes = {"train": {"epochs": 2, "calibrate": False}, "optim": {"lr": 0.05}}
    trial = load_config(overrides=merged(QUICK_TO_LEARN, changes))
    run(trial, tmp_path / "trial")
    store = CheckpointStore(tmp_path / "trial")
    first = store.folder / "epoch-0001"
    store.call_best(first)
    assert store.best == first
    nothing = {name: torch.zeros_like(tensor) for name, tensor in load_file(first / WEIGHTS_FILE).items()}
    save_file(nothing, first / WEIGHTS_FILE)
    config = trial.replaced({"train.calibrate": True})
    final = train_final(config, Mirror(tmp_path), Mirror(tmp_path / "trial"), verbose=False).folder
    best = find_checkpoint(final)
    assert best.name == "epoch-0002"
    finished = json.loads((final / FINISHED_FILE).read_text())
    assert finished == {"checkpoint": best.name, "scores": load_checkpoint(best).scores}
