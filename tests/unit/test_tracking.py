"""Tracking: what W&B's own files hold afterwards, across kills, without a server and without a network."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import wait_until
from wandb_offline import OfflineRun, assert_one_wandb_run, read_offline_runs
from wandb_server import KEY

from nuciseg import patience, tracking_wandb
from nuciseg.errors import ConfigError, DataError, ResourceError
from nuciseg.tracking import (
    RunIdentity,
    TrackingConfig,
    describe_run,
    open_tracker,
    read_identity,
    read_metrics,
    sync_command,
)

IDENTITY = RunIdentity("search-0007", "unet bce lr 1e-3", "search", "tune", ("unet", "synthetic"))

# The training loop of a run, reduced to what it tells the tracker: `first last ending kind` are its arguments.
LOOP = """
    import logging, os, shutil, signal, sys, time
    from pathlib import Path
    import numpy as np
    from nuciseg import tracking_wandb
    from nuciseg.tracking import RunIdentity, TrackingConfig, open_tracker

    logging.basicConfig()
    run_dir, first, last, ending, kind = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:6]
    identity = RunIdentity("search-0007", "unet bce lr 1e-3", "search", "tune", ("unet", "synthetic"))
    history = [{"epoch": epoch, "loss": 1 / epoch} for epoch in range(1, first)]
    tracker = open_tracker(TrackingConfig(kind=kind), identity, run_dir, {"optim": {"lr": 1e-3}}, history=history)
    for epoch in range(first, last + 1):
        tracker.log_epoch(epoch, {"loss": 1 / epoch})
        tracker.log_overlays(epoch, {"a": np.full((20, 60, 3), epoch, np.uint8)})
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "kill-service":
        children = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
        services = [int(pid) for pid in children if "wandb" in Path(f"/proc/{pid}/comm").read_text()]
        assert services
        for service in services:
            os.kill(service, signal.SIGKILL)
            os.waitpid(service, 0)
        tracker.log_epoch(last + 1, {"loss": 0.0})
        tracking_wandb.SETTLED_S = 0.1
        for epoch in (last + 2, last + 3):
            time.sleep(0.3)
            tracker.log_epoch(epoch, {"loss": 0.0})
    if ending == "no-pictures":
        for media in run_dir.rglob("files/media"):
            shutil.rmtree(media)
            media.write_text("a file where the folder of pictures would be")
        tracker.log_overlays(last + 1, {"a": np.zeros((20, 60, 3), np.uint8)})
    tracker.log_summary({"best": 0.5})
    tracker.finish(0)
    print("went on to the end")
"""


def _run_loop(
    run_dir: Path, *arguments: object, prefix: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", textwrap.dedent(LOOP), str(run_dir), *map(str, arguments)]
    env = {**os.environ, "HOME": str(run_dir.parent), **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OfflineRun]:
    """One complete offline run of this process: its folder and what its file holds."""
    run_dir = tmp_path_factory.mktemp("search") / "trial"
    checkpoint = run_dir / "checkpoint_best"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.safetensors").write_bytes(b"weights")
    config = TrackingConfig(project="study", tags=("mine",))
    tracker = open_tracker(config, IDENTITY, run_dir, {"optim": {"lr": 1e-3}, "seed": 3})
    for epoch in (1, 2, 3):
        tracker.log_epoch(epoch, {"train/loss": 1 / epoch, "lr": 1e-3})
        pictures = {name: np.full((20, 60, 3), 50 * epoch + index, np.uint8) for index, name in enumerate("ab")}
        tracker.log_overlays(epoch, pictures)
    tracker.log_image_scores([{"id": "a", "iou": 0.5, "separated": True}, {"id": "b", "iou": 0.25, "separated": False}])
    tracker.log_checkpoint(checkpoint)
    tracker.log_summary({"best_epoch": 2})
    tracker.finish(0)
    (run,) = read_offline_runs(run_dir)
    return run_dir, run


def test_without_a_key_the_run_is_kept_offline_with_its_identity(offline: tuple[Path, OfflineRun]) -> None:
    run_dir, run = offline
    assert run.run == {
        "id": "search-0007",
        "name": "unet bce lr 1e-3",
        "project": "study",
        "group": "search",
        "job_type": "tune",
        "tags": ["mine", "unet", "synthetic"],
    }
    assert run.config["optim"] == {"lr": 1e-3}
    assert run.config["seed"] == 3
    assert run.exit_code == 0
    assert read_identity(run_dir) == IDENTITY


def test_the_history_is_on_the_epoch_axis(offline: tuple[Path, OfflineRun]) -> None:
    _, run = offline
    assert run.epochs == [1, 2, 3]
    assert [row["train/loss"] for row in run.history if "train/loss" in row] == [1, 1 / 2, 1 / 3]
    assert run.step_metrics["*"] == "epoch"
    assert run.summary["best_epoch"] == 2


def test_pictures_table_and_checkpoint_are_there(offline: tuple[Path, OfflineRun]) -> None:
    import imageio.v3 as iio

    run_dir, run = offline
    pictures = run.pictures()
    assert set(pictures) == {(epoch, f"overlays/{name}") for epoch in (1, 2, 3) for name in "ab"}
    for (epoch, key), path in pictures.items():
        assert np.array_equal(iio.imread(path), np.full((20, 60, 3), 50 * epoch + (key[-1] == "b"), np.uint8))
    (table,) = [row["image_scores"] for row in run.history if "image_scores" in row]
    saved = json.loads((run.path.parent / "files" / table["path"]).read_text())
    assert saved["columns"] == ["id", "iou", "separated"]
    assert saved["data"] == [["a", 0.5, True], ["b", 0.25, False]]
    (model,) = [artifact for artifact in run.artifacts if artifact["type"] == "model"]
    assert model["name"] == "model-search-0007"
    assert set(model["aliases"]) == {"best", "latest"}
    assert model["files"] == {"weights.safetensors": str(run_dir / "checkpoint_best" / "weights.safetensors")}


def test_everything_to_upload_lies_in_the_runs_folder(offline: tuple[Path, OfflineRun]) -> None:
    run_dir, run = offline
    files = [Path(path) for artifact in run.artifacts for path in artifact["files"].values()]
    assert files
    assert all(path.is_relative_to(run_dir) and path.exists() for path in files)


def test_sync_command_names_folders_that_exist(offline: tuple[Path, OfflineRun], tmp_path: Path) -> None:
    run_dir, run = offline
    for folder in (run_dir, run_dir.parent):  # a run, and a search with one trial
        command = sync_command(folder)
        assert command is not None
        assert describe_run(run_dir).endswith(command)
        listed = subprocess.run(
            command.replace("wandb sync", "ls -d"), shell=True, capture_output=True, text=True, check=True
        )
        assert listed.stdout.split() == [str(run.path.parent)]
    search = tmp_path / "my search"
    for trial in "xy":
        shutil.copytree(run_dir, search / trial)
    command = sync_command(search)
    assert command is not None
    dry_run = subprocess.run(
        command.replace("wandb sync", f"{Path(sys.executable).parent}/wandb sync --dry-run"),
        shell=True,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "WANDB_SILENT": "false"},
    )
    assert "2 run(s)" in dry_run.stdout + dry_run.stderr
    (search / "x" / "wandb" / "run-20260101_000000-x").mkdir()  # an online leg, which the server may have lost sight of
    assert sync_command(search / "x") == f"wandb sync --include-online '{search / 'x'}'/wandb/*run-*-*"
    assert sync_command(search) == f"wandb sync --include-online '{search}'/*/wandb/*run-*-*"
    assert sync_command(tmp_path / "nothing") is None


def test_a_search_is_described_by_its_trials(offline: tuple[Path, OfflineRun], tmp_path: Path) -> None:
    search = tmp_path / "search"
    for trial in ("trial-1", "trial-2"):
        identity = RunIdentity(trial, trial, "search", "tune")
        tracker = open_tracker(TrackingConfig(kind="none"), identity, search / trial, {})
        tracker.log_epoch(1, {"loss": 1.0})
        tracker.finish(0)
    said = describe_run(search)
    assert said == f"metrics: {search}/*/metrics.jsonl"
    assert len(list(tmp_path.glob("search/*/metrics.jsonl"))) == 2
    assert describe_run(search / "trial-1") == f"metrics: {search}/trial-1/metrics.jsonl"

    for trial in ("trial-1", "trial-2"):
        path = search / trial / "tracking.json"
        url = f"https://wandb.ai/team/study/runs/{trial}"
        path.write_text(json.dumps({**json.loads(path.read_text()), "url": url}))
    assert describe_run(search) == "W&B runs: https://wandb.ai/team/study (group search)"
    assert describe_run(search / "trial-1") == "W&B run: https://wandb.ai/team/study/runs/trial-1"

    shutil.copytree(offline[0], search / "trial-3")  # W&B was out of reach for this one
    for part in ("https://wandb.ai/team/study (group search)", f"wandb sync {search}/trial-3/wandb/offline-run-"):
        assert part in describe_run(search)


def test_a_killed_run_goes_on_without_gaps_or_duplicates(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    killed = _run_loop(run_dir, 1, 4, "kill", "offline")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "lo')  # killed in mid-write
    # The checkpoint remembers epochs 1 to 4; 4 is trained again although it was logged; epoch 5 is new.
    resumed = _run_loop(run_dir, 4, 6, "end", "offline")
    assert resumed.returncode == 0, resumed.stderr
    legs = read_offline_runs(run_dir)
    assert len(legs) == 2
    # A leg killed before W&B first wrote to the disk has nothing in it; the next leg then logs its epochs.
    assert {leg.run["id"] for leg in legs if leg.run} == {"search-0007"}
    assert sorted(legs[0].epochs + legs[1].epochs) == [1, 2, 3, 4, 5, 6]
    steps = [row["_step"] for leg in legs for row in leg.history]
    assert steps == sorted(set(steps))
    assert [row["epoch"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_epochs_only_in_the_checkpoint_are_logged_on_resume(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingConfig(kind="offline"), IDENTITY, tmp_path, {})
    tracker.log_epoch(1, {"loss": 1.0})
    tracker.finish(1)
    history = [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    tracker = open_tracker(TrackingConfig(kind="offline"), IDENTITY, tmp_path, {}, history=history)
    tracker.log_epoch(3, {"loss": 0.25})
    tracker.finish(0)
    assert [leg.epochs for leg in read_offline_runs(tmp_path)] == [[1], [2, 3]]
    assert read_metrics(tmp_path / "metrics.jsonl") == [*history, {"epoch": 3, "loss": 0.25}]


def test_an_unreachable_server_neither_stops_training_nor_learns_the_key(tmp_path: Path) -> None:
    start = time.monotonic()
    result = _run_loop(tmp_path / "run", 1, 3, "end", "auto", WANDB_API_KEY=KEY, WANDB_MODE="online")
    assert time.monotonic() - start < 60
    assert "went on to the end" in result.stdout, result.stderr
    warnings = [line for line in result.stderr.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "kept offline" in warnings[0]
    (run,) = read_offline_runs(tmp_path / "run")
    assert run.epochs == [1, 2, 3]
    assert KEY not in result.stdout + result.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_server_that_answers_with_errors_makes_an_offline_run(tmp_path: Path) -> None:
    code = "import http.server as s; h = s.ThreadingHTTPServer(('127.0.0.1', 0), s.BaseHTTPRequestHandler); "
    code += "print(h.server_port, flush=True); h.serve_forever()"
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        result = _run_loop(
            tmp_path / "run", 1, 2, "end", "auto", WANDB_API_KEY=KEY, WANDB_MODE="online", WANDB_BASE_URL=url
        )
    finally:
        server.kill()
        server.wait()
    assert "went on to the end" in result.stdout, result.stderr
    assert [run.epochs for run in read_offline_runs(tmp_path / "run")] == [[1, 2]]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_training_goes_on_when_wandbs_service_dies(tmp_path: Path) -> None:
    result = _run_loop(tmp_path / "run", 1, 2, "kill-service", "offline")
    assert result.returncode == 0, result.stderr
    assert "went on to the end" in result.stdout
    assert result.stderr.count("W&B failed") == 1
    assert result.stderr.count("lost epochs") <= 1, "what is gone is left once"
    assert [row["epoch"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_training_goes_on_when_pictures_cannot_be_written(tmp_path: Path) -> None:
    result = _run_loop(tmp_path / "run", 1, 2, "no-pictures", "offline")
    assert "went on to the end" in result.stdout, result.stderr
    assert result.stderr.count("W&B failed") == 1


def test_a_file_that_takes_no_more_rows_is_left(tmp_path: Path) -> None:
    """As after the storage was away: what W&B writes into the file that it holds open arrives nowhere."""
    tracker = open_tracker(TrackingConfig(kind="offline"), IDENTITY, tmp_path, {})
    tracker.log_epoch(1, {"loss": 1.0})
    wait_until(lambda: read_offline_runs(tmp_path)[0].epochs == [1], "the first epoch in the file")
    (held,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    held.rename(held.with_suffix(".held"))
    shutil.copy(held.with_suffix(".held"), held)
    tracker.log_epoch(2, {"loss": 0.5})
    time.sleep(tracking_wandb.SETTLED_S + 0.1)
    tracker.log_epoch(3, {"loss": 0.3})
    tracker.log_image_scores([{"id": "a", "iou": 0.5}])
    tracker.finish(0)
    assert_one_wandb_run(tmp_path)
    first, *_, last = read_offline_runs(tmp_path)
    assert first.epochs == [1]
    assert any("image_scores" in row for row in last.history)


def test_an_epoch_is_written_once_where_the_storage_went_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written arrived, or a part of it, though the storage did not say so."""
    monkeypatch.setattr(patience, "WAITS_S", (0.0, 0.0))
    open_file, answers = Path.open, [60, 10, 0]

    def losing(path: Path, mode: str = "r", *args: Any, **named: Any) -> Any:
        if mode == "a" and path.name == "metrics.jsonl" and answers:
            written = answers.pop()
            with open_file(path, mode, *args, **named) as file:
                file.write('{"epoch": 2, "loss": 0.5, "as it was": true}\n'[:written])
            raise OSError(errno.EIO, "Input/output error")
        return open_file(path, mode, *args, **named)

    tracker = open_tracker(TrackingConfig(kind="none"), IDENTITY, tmp_path, {})
    tracker.log_epoch(1, {"loss": 1.0})
    monkeypatch.setattr(Path, "open", losing)
    tracker.log_epoch(2, {"loss": 0.5})
    assert not answers
    assert [row["epoch"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_full_disk_is_told_where_figures_are_written(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingConfig(kind="none"), IDENTITY, tmp_path, {})
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"metrics\.jsonl cannot be written \(No space left"):
        tracker.log_epoch(1, {"loss": 1.0})


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: it watches wandb's own process")
def test_offline_no_process_touches_the_network(tmp_path: Path) -> None:
    log = tmp_path / "connections"
    prefix = ("strace", "-f", "-qq", "-o", str(log), "-e", "trace=connect,sendto")
    result = _run_loop(tmp_path / "run", 1, 2, "end", "auto", prefix=prefix)
    assert "went on to the end" in result.stdout, result.stderr
    calls = log.read_text().splitlines()
    assert any("AF_UNIX" in line for line in calls)  # wandb's service was watched
    assert not [line for line in calls if "AF_INET" in line]


def test_wandb_is_not_imported_where_it_is_not_used(tmp_path: Path) -> None:
    code = textwrap.dedent(LOOP) + "\nassert 'wandb' not in sys.modules\n"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), "1", "2", "end", "none"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


def test_json_lines_have_no_nan_and_no_epoch_twice(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingConfig(kind="none"), IDENTITY, tmp_path, {})
    tracker.log_epoch(1, {"loss": float("nan"), "score": np.float32(0.5)})
    tracker.log_epoch(1, {"loss": 2.0})
    tracker.finish(0)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1, "loss": null, "score": 0.5}\n'
    assert not (tmp_path / "wandb").exists()


def test_errors_say_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with pytest.raises(ConfigError, match="wandb login"):
        open_tracker(TrackingConfig(kind="wandb"), IDENTITY, tmp_path / "run", {})
    open_tracker(TrackingConfig(kind="none"), IDENTITY, tmp_path / "run", {})
    other = RunIdentity("search-0008", "unet", "search", "tune")
    with pytest.raises(ConfigError, match=r"search-0007.*own folder"):
        open_tracker(TrackingConfig(kind="none"), other, tmp_path / "run", {})
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 1}\nrubbish\n{"epoch": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        open_tracker(TrackingConfig(kind="none"), IDENTITY, tmp_path / "run", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="another folder"):
        open_tracker(TrackingConfig(kind="none"), IDENTITY, tmp_path / "file" / "run", {})
    with pytest.raises(ConfigError, match="a/b"):
        RunIdentity("a/b", "name", "group", "train")
