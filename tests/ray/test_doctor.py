"""`doctor` on a real Ray of one node: every check, what is said where something is wrong, a killed worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_workers import worker_pids

from nuciseg import doctor
from nuciseg.config import load_config, merged
from nuciseg.distributed import examination, rehearsal

pytestmark = pytest.mark.usefixtures("ray_session")

NAMES = ["nodes", "versions", "GPUs", "bf16", "room", "all-reduce", "storage", "data", "W&B", "clocks", "disk"]


def test_a_machine_that_can_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--json", "--run.storage_path", str(tmp_path / "runs")])
    checks = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in checks] == NAMES
    assert [check["said"] for check in checks if not check["passed"]] == []
    said = {check["name"]: check["said"] for check in checks}
    assert f"torch {torch.__version__}" in said["versions"]
    assert said["all-reduce"].startswith("gloo over 2 workers: ")
    assert said["data"] == "240 training images, readable on 1 node"
    assert said["W&B"].startswith("offline: ")
    assert not (tmp_path / "runs").exists()


def test_a_head_whose_workers_are_to_come_is_not_taken_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "gpus_within_reach", lambda: 4)  # as after `ray up cluster.yaml`
    doctor.main(["--json", "--run.storage_path", str(tmp_path), "--scale.cpus_per_worker", "1"])
    said = {check["name"]: check["said"] for check in json.loads(capsys.readouterr().out)}
    assert said["GPUs"] == "none yet, up to 4 come with the work"
    assert said["bf16"].startswith("not looked at: no node with a GPU is up")
    assert said["all-reduce"].startswith("not measured: no node with a GPU is up")


def test_what_is_wrong_is_said_and_the_rest_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    wrong = {"--run.storage_path": tmp_path / "file" / "runs", "--data.root": tmp_path / "no", "--scale.num_workers": 9}
    with pytest.raises(SystemExit) as exit_:
        doctor.main([*(str(word) for pair in wrong.items() for word in pair), "--kill-worker"])
    assert exit_.value.code == 1
    *lines, last = capsys.readouterr().out.splitlines()
    by_name = {line[8:20].strip(): line for line in lines}
    assert [name for name, line in by_name.items() if line.startswith("FAILED")] == [
        "room",
        "storage",
        "data",
        "recovery",
    ]
    assert "scale.num_workers is 9" in by_name["room"]
    assert f"{tmp_path / 'file' / 'runs'} cannot be written" in by_name["storage"]
    assert str(tmp_path / "no") in by_name["data"]
    assert last == f"4 of {len(lines)} checks failed"


@pytest.mark.slow
def test_a_run_goes_on_after_a_worker_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = worker_pids()
    doctor.main(["--json", "--kill-worker", "--run.storage_path", str(tmp_path / "runs")])
    [*_, recovery] = json.loads(capsys.readouterr().out)
    assert (recovery["name"], recovery["passed"]) == ("recovery", True), recovery["said"]
    assert "the run went on under the same W&B id, logged each of 30 epochs once" in recovery["said"]
    assert not (tmp_path / "runs").exists()
    assert len(worker_pids() - before) == 6, "two workers of the calm run, two and two more of the other"


def test_a_run_that_ends_otherwise_is_noticed(tmp_path: Path) -> None:
    one_worker = merged(rehearsal.TINY, {"scale": {"num_workers": 1}})
    for seed, name in enumerate(("a", "b")):
        config = load_config(overrides=merged(one_worker, {"seed": seed}))
        rehearsal.run_training(rehearsal.job_of(config, tmp_path / name, verbose=False))
    assert rehearsal.different(tmp_path / "a", tmp_path / "a") == ""
    assert (
        rehearsal.different(tmp_path / "a", tmp_path / "b")
        == "its scores are other ones than those of the undisturbed run"
    )
