"""A search, and a run of two workers, in a bucket of a real S3 server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from gcs_server import serving_gcs
from played_nodes import HELD_RUNS
from s3_server import make_bucket, serving_s3, use_server
from small_runs import SMALL, last_checkpoint

from nuciseg.buckets import BucketFolder
from nuciseg.config import merged
from nuciseg.distributed.mirror import fetched_to_read
from nuciseg.distributed.worker import FINISHED_FILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Start = Callable[..., psutil.Popen]
NUM_EPOCHS = 8
SEARCH = {
    "train": {"epochs": NUM_EPOCHS},
    "scale": {"cpus_per_worker": 1},
    "search": {
        "num_trials": 2,
        "sampler": "random",
        "scheduler": "none",
        "max_concurrent": 1,
        "final": False,
        "space": {"optim.lr": {"loguniform": [0.01, 0.1]}},
    },
}


@pytest.fixture
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a new bucket, in S3 unless the test is given "gs"."""
    if getattr(request, "param", "s3") == "gs":
        with serving_gcs(monkeypatch) as uri:
            yield uri
    else:
        with serving_s3() as address:
            use_server(address, monkeypatch)
            yield f"s3://{make_bucket(address)}"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a verb on a machine of its own: its cache is a folder of the name that is given first, so is its log.

    A step takes `step_s` longer.
    """
    started: list[psutil.Popen] = []

    def start_verb(machine: str, verb: str, *words: str, step_s: float = 0.0) -> psutil.Popen:
        environment = {**os.environ, "NUCISEG_CACHE": str(tmp_path / machine)}
        program = [str(HELD_RUNS), verb, str(step_s)] if step_s else ["-m", f"nuciseg.{verb}"]
        command = [sys.executable, *program, *words]
        with (tmp_path / f"{machine}.log").open("w") as log:
            started.append(psutil.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT))
        return started[-1]

    yield start_verb
    for driver in started:
        if driver.poll() is None:
            end([*driver.children(recursive=True), driver])


def end(family: list[psutil.Process]) -> None:
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_a_killed_search_goes_on_from_another_machine(bucket: str, tmp_path: Path, start: Start) -> None:
    uri = f"{bucket}/runs/search"
    where = {"run": {"storage_path": f"{bucket}/runs", "name": "search"}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(merged(SMALL, merged(SEARCH, where))))

    def names(end: str) -> list[str]:
        return [file.name for file in BucketFolder(uri).files() if file.name.endswith(end)]

    def running() -> list[str]:
        finished = {name.split("/")[0] for name in names(FINISHED_FILE)}
        logs = [name for name in names("/metrics.jsonl") if name.split("/")[0] not in finished]
        return [name for name in logs if BucketFolder(uri).read(name).count(b"\n") >= 2]

    # Of four steps an epoch: the second trial has seconds to go where it is seen to be begun.
    driver = start("first", "tune", "--config", "search.yaml", step_s=0.3)
    while not (names(FINISHED_FILE) and running()) and driver.is_running() and driver.poll() is None:
        time.sleep(0.5)  # the server shares this process
    family = driver.children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL, (tmp_path / "first.log").read_text()
    psutil.wait_procs(family, timeout=30)
    end(family)
    (finished,), (begun,) = names(FINISHED_FILE), running()
    kept = BucketFolder(uri).read(begun).split(b"\n")[0]
    checkpoints = {name for name in names(".safetensors") if name.startswith(finished.split("/")[0])}

    second = start("second", "tune", "--resume", uri)
    log = tmp_path / "second.log"
    assert second.wait() == 0, log.read_text()
    assert f"search folder: {uri}\n" in log.read_text()
    assert f"python -m nuciseg.report {uri}" in log.read_text()
    trials = json.loads(BucketFolder(uri).read("results.json"))
    assert [(trial["epochs"], trial["failure"]) for trial in trials] == [(NUM_EPOCHS, None)] * 2
    assert BucketFolder(uri).read(begun).split(b"\n")[0] == kept, "an interrupted trial was begun anew"
    assert checkpoints <= set(names(".safetensors"))
    assert len(names(FINISHED_FILE)) == 2


def test_two_workers_meet_in_the_bucket_alone(bucket: str, tmp_path: Path, start: Start) -> None:
    uri = f"{bucket}/runs/two"
    where = {
        "run": {"storage_path": f"{bucket}/runs", "name": "two"},
        "scale": {"num_workers": 2, "cpus_per_worker": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(merged(SMALL, where)))
    driver = start("cache", "train", "--config", "run.yaml")
    assert driver.wait() == 0, (tmp_path / "cache.log").read_text()
    said = (tmp_path / "cache.log").read_text()
    assert f"best checkpoint: {uri}/checkpoints/epoch-" in said
    assert "epoch 4/4" in said, "the driver follows what the workers push"
    copies = {path.relative_to(tmp_path / "cache" / "runs").parts[0] for path in tmp_path.rglob(FINISHED_FILE)}
    assert copies == {"work", "workers"}
    assert last_checkpoint(fetched_to_read(uri)).progress.epoch == 4
    assert not [file.name for file in BucketFolder(uri).files() if file.name.startswith("failure")]
