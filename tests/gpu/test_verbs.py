"""The verbs on a GPU, as a user starts them: a search, a run that is taken up again, a prediction, `doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import SMALL, logged_epochs, wait_until

from nuciseg.config import merged
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

EPOCHS = 40  # more than can be trained before the run is killed


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(merged(SMALL, {"train": {"precision": "auto"}})))
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:  # short: sockets lie in it
        monkeypatch.setenv("RAY_TMPDIR", ray_folder)
        yield


def said(verb: str, *words: str) -> str:
    """What a verb prints; it must end well."""
    command = [sys.executable, "-m", f"nuciseg.{verb}", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_search_trains_on_the_gpu() -> None:
    space = {"optim.lr": {"choice": [0.01, 0.001]}}
    settings = merged(yaml.safe_load(Path("small.yaml").read_text()), {"search": {"space": space, "sampler": "grid"}})
    Path("search.yaml").write_text(yaml.safe_dump(settings))
    said("tune", "--config", "search.yaml", "--run.name", "search", "--search.scheduler", "none")
    trials = json.loads(Path("runs/search/results.json").read_text())
    assert [(trial["failure"], trial["epochs"]) for trial in trials] == [(None, 4)] * 2


def test_a_run_on_the_gpu_goes_on_where_it_was_and_its_weights_predict() -> None:
    words = ["--config", "small.yaml", "--run.name", "run", "--train.epochs", str(EPOCHS)]
    killed = subprocess.Popen([sys.executable, "-m", "nuciseg.train", *words])
    wait_until(lambda: len(logged_epochs(Path("runs/run"))) > 1, "two epochs", limit_s=100)
    killed.kill()
    killed.wait()
    assert len(logged_epochs(Path("runs/run"))) < EPOCHS
    said("train", "--resume", "runs/run")
    assert logged_epochs(Path("runs/run")) == list(range(1, EPOCHS + 1))
    write_nucleus_folder(SyntheticConfig(num_train=2, num_test=1), Path("clusters"))
    said("predict", "clusters/test", "--checkpoint", "runs/run", "--out", "masks")
    assert len(list(Path("masks").glob("*_masks.tif"))) == 1


def test_doctor_finds_the_gpu_and_recovers_from_a_killed_worker() -> None:
    checks = {each["name"]: each for each in json.loads(said("doctor", "--json", "--kill-worker"))}
    assert [each for each in checks.values() if not each["passed"]] == []
    assert torch.cuda.get_device_name(0) in checks["GPUs"]["said"]
    assert "recovery" in checks
