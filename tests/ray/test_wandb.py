"""What a search leaves for Weights & Biases: one run a trial, read back from its offline file, and no key anywhere."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from small_runs import QUICK_TO_LEARN
from wandb_offline import OfflineRun, read_offline_runs

from nuciseg.config import merged
from nuciseg.distributed.trials import RESULTS_FILE

NUM_EPOCHS = 5
GRID = [0.05, 1e-9, 1e-8]  # the first learns; scheduled after it, the others are stopped
SEARCH = {
    "train": {"epochs": NUM_EPOCHS},
    "tracking": {"kind": "auto", "tags": ["from-a-test"]},
    "run": {"storage_path": "runs", "name": "borders"},
    "search": {
        "sampler": "grid",
        "scheduler": "asha",
        "grace_epochs": 1,
        "reduction_factor": 2,
        "max_concurrent": 1,
        "space": {"optim.lr": {"choice": GRID}},
    },
}


class Searched(NamedTuple):
    folder: Path
    ray_folder: Path
    trials: list[dict[str, Any]]
    key: str
    said: str

    def runs(self, name: str) -> list[OfflineRun]:
        return read_offline_runs(self.folder / name)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    """A search of a user who has a key, while W&B's server cannot be reached."""
    home = tmp_path_factory.mktemp("home")
    (home / "search.yaml").write_text(yaml.safe_dump(merged(QUICK_TO_LEARN, SEARCH)))
    key = secrets.token_hex(20)
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
    environment = {**os.environ, "WANDB_API_KEY": key, "HOME": str(home), "RAY_TMPDIR": str(ray_folder)}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9"}  # nobody listens there
    del environment["WANDB_MODE"]
    command = [sys.executable, "-m", "nuciseg.tune", "--config", "search.yaml"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    folder = home / "runs" / "borders"
    yield Searched(folder, ray_folder, json.loads((folder / RESULTS_FILE).read_text()), key, done.stdout + done.stderr)
    shutil.rmtree(ray_folder, ignore_errors=True)


def test_every_trial_has_one_run_that_says_what_it_is(searched: Searched) -> None:
    assert len(searched.trials) == len(GRID)
    for trial in searched.trials:
        legs = searched.runs(trial["id"])
        for leg in legs:
            assert leg.run["id"] == f"borders-{trial['id']}"
            assert (leg.run["project"], leg.run["group"], leg.run["job_type"]) == ("nuciseg", "borders", "tune")
            assert leg.run["name"].endswith(f"lr={trial['sample']['optim.lr']:.3g}")
            assert {"from-a-test", "unet", "touching_border"} <= set(leg.run["tags"])
            assert leg.config["optim"]["lr"] == trial["sample"]["optim.lr"]
            assert leg.config["model"]["width"] == 4
    [final] = searched.runs("final")
    assert (final.run["group"], final.run["job_type"], final.run["name"]) == ("borders", "train", "final")


def test_every_epoch_is_there_once_with_all_figures(searched: Searched) -> None:
    epochs = {}
    for trial in searched.trials:
        legs = searched.runs(trial["id"])
        logged = [epoch for leg in legs for epoch in leg.epochs]
        assert logged == list(range(1, trial["epochs"] + 1))
        epochs[trial["sample"]["optim.lr"]] = trial["epochs"]
        rows = [row for leg in legs for row in leg.history if "train_loss" in row]
        for row in rows:
            for name in ("train_bce", "train_dice", "learning_rate", "border_dice", "cluster_score", "ap50_pooled"):
                assert isinstance(row[name], (int, float)), name
            assert row["images_per_s"] > 0
            assert 0 <= row["data_wait_share"] <= 1
    assert epochs[GRID[0]] == NUM_EPOCHS
    assert min(epochs.values()) < NUM_EPOCHS, "the scheduler stopped no trial"


def test_a_trial_that_went_to_the_end_has_a_fixed_panel_of_pictures(searched: Searched) -> None:
    best = searched.trials[0]
    [leg] = searched.runs(best["id"])
    pictures = leg.pictures()
    assert 1 <= len({key for _, key in pictures}) <= 16
    assert {epoch for epoch, _ in pictures} == set(range(1, NUM_EPOCHS + 1))
    assert all(path.stat().st_size > 0 for path in pictures.values())
    [final] = searched.runs("final")
    assert {key for _, key in final.pictures()} == {key for _, key in pictures}


def test_a_trial_that_was_stopped_has_pictures_too(searched: Searched) -> None:
    stopped = [trial for trial in searched.trials if trial["epochs"] < NUM_EPOCHS]
    assert stopped
    for trial in stopped:
        drawn = [epoch for leg in searched.runs(trial["id"]) for epoch, _ in leg.pictures()]
        assert trial["epochs"] in drawn
        assert len(drawn) <= 16 * trial["epochs"], "the same picture twice"


def test_every_trial_has_its_table_and_its_checkpoint_also_one_that_was_stopped(searched: Searched) -> None:
    for trial in searched.trials:
        legs = searched.runs(trial["id"])
        tables = [row["image_scores"] for leg in legs for row in leg.history if "image_scores" in row]
        assert len(tables) == 1, f"{trial['epochs']} epochs"
        assert tables[0]["nrows"] == 12  # the validation images
        [artifact] = [artifact for leg in legs for artifact in leg.artifacts if artifact["type"] == "model"]
        assert {"checkpoint.json", "weights.safetensors"} <= set(artifact["files"])
        summary = {key: value for leg in legs for key, value in leg.summary.items()}
        assert summary["best_border_dice"] == pytest.approx(trial["score"])
        assert legs[-1].exit_code == 0


def test_the_command_to_send_it_is_printed(searched: Searched) -> None:
    assert "wandb sync runs/borders/*/wandb/offline-run-*" in searched.said


def test_the_key_is_written_nowhere(searched: Searched) -> None:
    key = searched.key.encode()
    assert searched.key not in searched.said
    files = [path for root in (searched.folder, searched.ray_folder) for path in root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in searched.ray_folder.rglob("*"))
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if key in path.read_bytes()] == []
