"""What workers inherit from the process that starts Ray."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from gloo_workers import on_workers
from small_runs import small_config

from nuciseg.config import write_config
from nuciseg.distributed import storage, training
from nuciseg.distributed.cluster import environment
from nuciseg.distributed.failures import noted_failure
from nuciseg.distributed.worker import Job
from nuciseg.engine.inference import Place
from nuciseg.errors import StorageAwayError
from nuciseg.tracking import RunIdentity

SERVICE = "3-1-unix-/nowhere/socket"
ADDRESSES = """
import os, ray
from nuciseg.distributed.cluster import connect
connect(verbose=False, num_cpus=1, num_gpus=0)
seen = ray.remote(lambda: [os.environ.get(name) for name in ("WANDB_SERVICE", "RAY_API_SERVER_ADDRESS")])
print(*ray.get(seen.remote()), os.environ["WANDB_SERVICE"], os.environ.get("RAY_API_SERVER_ADDRESS"))
"""
TURNS = """
import os, ray
from nuciseg.distributed.cluster import connect
connect(verbose=False, num_cpus=1, num_gpus=0)
look = lambda: (os.sched_getscheduler(0), os.nice(0))
print(look(), ray.get(ray.remote(look).remote()))
"""

TRIAL = """
import os, ray
from pathlib import Path
from nuciseg.config import load_config
from nuciseg.distributed.cluster import connect
from nuciseg.distributed.search import start_search
connect(verbose=False, num_cpus=2, num_gpus=2)
[trial] = start_search(load_config(Path("config.yaml")), Path("runs/search"), verbose=False)
print(f"{trial.epochs} epochs, failure: {trial.failure}")
"""


def run_script(script: str) -> str:
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:  # short: sockets lie in it
        environment = {**os.environ, "WANDB_SERVICE": SERVICE, "RAY_TMPDIR": ray_folder}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_trial_computes_on_the_gpu_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray has a GPU to give, but torch cannot use one, the trial says so."""
    monkeypatch.chdir(tmp_path)
    config = small_config(
        **{"train.epochs": 1, "search.sampler": "grid", "search.space": {"optim.lr": {"choice": [0.1]}}}
    )
    write_config(config, Path("config.yaml"))
    said = run_script(TRIAL)
    if torch.cuda.is_available():
        assert said.endswith("1 epochs, failure: None\n")
    else:
        sees_none = (
            r"0 epochs, failure: this trial was given a GPU, but torch \S+ sees none on node .+use_gpu to false\n"
        )
        assert re.search(sees_none, said), said
        assert " trial 00000 failed - this trial was given a GPU" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where the trial's own process has no GPU")
def test_the_process_that_looks_after_a_trial_of_several_workers_needs_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets as far as the workers, which cannot talk by NCCL here."""
    monkeypatch.chdir(tmp_path)
    space = {"search.sampler": "grid", "search.space": {"optim.lr": {"choice": [0.1]}}}
    write_config(small_config(**space, **{"scale.num_workers": 2, "run.max_failures": 0}), Path("config.yaml"))
    said = run_script(TRIAL)
    assert "0 epochs, failure: " in said
    assert "was given a GPU" not in said
    assert "the workers died" in said, said


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has SCHED_BATCH")
def test_rays_processes_wait_for_their_turn_without_being_behind_the_others() -> None:
    nice = os.nice(0)
    assert run_script(TURNS).strip() == f"({os.SCHED_OTHER}, {nice}) ({os.SCHED_BATCH}, {nice})"


def test_workers_are_told_of_the_dashboard_and_of_no_wandb_service_that_ends_before_them() -> None:
    of_worker, dashboard, here, dashboard_here = run_script(ADDRESSES).split()
    assert (of_worker, here, dashboard_here) == ("None", SERVICE, "None")
    assert dashboard.startswith("http://127.0.0.1:")


def test_the_environment_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.delenv("ADDED", raising=False)
    with environment({"KEPT": None, "ADDED": "within"}):
        assert "KEPT" not in os.environ
        assert os.environ["ADDED"] == "within"
    assert os.environ["KEPT"] == "before"
    assert "ADDED" not in os.environ


def _who_sees_the_folder(place: Place, folders: list[Path]) -> bool | str:
    storage.SEEN_TIMEOUT_S = 1.0  # in a process of its own
    identity = RunIdentity("run", "run", "group", "train", ())
    try:
        return training._all_see_folder(Job(small_config(), folders[place.rank], identity))
    except StorageAwayError as error:
        return str(error)


@pytest.mark.parametrize("seen_by", [(0, 1), (1,), ()], ids=["both", "one", "none"])
def test_workers_that_do_not_all_see_the_folder_end_with_a_reason(seen_by: tuple[int, ...], tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for rank in seen_by:
        folders[rank].mkdir()
        (folders[rank] / training.STARTED_FILE).touch()
    answers = on_workers(2, tmp_path / "meet", _who_sees_the_folder, folders)
    if not seen_by:
        assert all("does not see" in str(answer) for answer in answers)
        return
    assert answers == [len(seen_by) == 2] * 2
    noted = noted_failure(folders[1])
    assert (noted is None) == (len(seen_by) == 2)
    assert noted is None or "does not see" in str(noted)
