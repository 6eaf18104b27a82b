"""W&B lost in the middle of an online run: real training, wandb's real client, a stand-in for the server alone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from small_runs import SMALL, logged_epochs, show_seconds, wait_until
from wandb_server import KEY, ReceivedRun, WandbServer, serving_wandb

from nuciseg.config import merged
from nuciseg.tracking import METRICS_FILE

pytestmark = pytest.mark.slow

NUM_EPOCHS = 7
HELD = Path(__file__).parents[1] / "held_runs.py"
STEP_S = 1.0  # wandb sends its rows every 15 seconds: those of three or four epochs, of four steps each


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that this user's W&B is set to."""
    monkeypatch.chdir(tmp_path)
    settings = {"train": {"epochs": NUM_EPOCHS}, "tracking": {"kind": "wandb", "num_overlays": 2}}
    Path("small.yaml").write_text(yaml.safe_dump(merged(SMALL, settings)))
    with serving_wandb() as server:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.delenv("WANDB_MODE")
        yield server


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(HELD), "train", str(STEP_S), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lose_after_two_epochs(server: WandbServer) -> ReceivedRun:
    wait_until(lambda: len(server.runs) == 1, "the server has a run")
    [run] = server.runs.values()
    wait_until(lambda: len(run.epochs()) >= 2, "the server has two epochs")
    server.stop()
    return run


def assert_whole(run: ReceivedRun, server: WandbServer) -> None:
    """Each epoch once, with the pictures, the table and the checkpoint."""
    rows = run.rows()
    assert run.epochs() == list(range(1, NUM_EPOCHS + 1))
    pictures = [value["path"] for row in rows for key, value in row.items() if key.startswith("overlays/")]
    assert pictures
    assert set(pictures) <= set(run.files)
    assert sum("image_scores" in row for row in rows) == 1
    [checkpoint] = [id for id in server.artifacts if id.startswith("model-")]
    assert checkpoint in server.committed
    assert {"checkpoint.json", "weights.safetensors"} <= set(server.artifacts[checkpoint])
    assert run.exit_code == 0
    assert server.unknown == []


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


def test_the_printed_command_sends_what_was_logged_while_the_server_was_away(server: WandbServer) -> None:
    process = start("--config", "small.yaml", "--run.name", "a")
    run = lose_after_two_epochs(server)
    said, errors = finished(process)
    last_epoch_s = (Path("runs/a") / METRICS_FILE).stat().st_mtime
    show_seconds("W&B is lost: from the last epoch to the end of the run", time.time() - last_epoch_s)
    assert logged_epochs(Path("runs/a")) == list(range(1, NUM_EPOCHS + 1))
    assert len(run.epochs()) < NUM_EPOCHS
    assert f"W&B at {server.address} does not answer any more: the run goes on offline in " in errors
    assert KEY not in said + errors
    command = said.splitlines()[-1].rpartition("to upload it: ")[2]
    assert command == "wandb sync --include-online runs/a/wandb/*run-*-*"

    server.start()
    synced = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=100, check=False)
    assert synced.returncode == 0, synced
    assert_whole(run, server)


def test_a_run_that_was_killed_while_the_server_was_away_goes_on_with_the_same_one(server: WandbServer) -> None:
    process = start("--config", "small.yaml", "--run.name", "a")
    run = lose_after_two_epochs(server)
    wait_until(lambda: len(logged_epochs(Path("runs/a"))) >= 4, "two epochs more are logged")
    process.kill()
    process.communicate(timeout=60)
    assert len(run.epochs()) < NUM_EPOCHS

    server.start()
    finished(start("--resume", "runs/a"))
    assert list(server.runs.values()) == [run]
    assert_whole(run, server)
    assert [row["_step"] for row in run.rows()] == list(range(len(run.rows())))
