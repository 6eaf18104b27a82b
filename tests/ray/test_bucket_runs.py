"""A search, and a run of two workers, in a bucket of a real S3 server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from s3_server import make_bucket, serving_s3, use_server
from small_runs import SMALL, assert_same_run, logged_epochs, small_config

from nuciseg.buckets import BucketFolder
from nuciseg.config import merged
from nuciseg.distributed.mirror import fetched_to_read, working_copy
from nuciseg.distributed.training import run_training
from nuciseg.distributed.worker import FINISHED_FILE, Job
from nuciseg.tracking import RunIdentity

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving_s3() as address:
        use_server(address, monkeypatch)
        yield f"s3://{make_bucket(address)}"


def tune(folder: Path, cache: str, *words: str) -> psutil.Popen:
    environment = {**os.environ, "NUCISEG_CACHE": str(folder / cache)}
    command = [sys.executable, "-m", "nuciseg.tune", *words]
    with (folder / f"{cache}.log").open("w") as log:
        return psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def test_a_killed_search_goes_on_from_another_machine(bucket: str, tmp_path: Path) -> None:
    uri = f"{bucket}/runs/search"
    where = {"run": {"storage_path": f"{bucket}/runs", "name": "search"}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(merged(SMALL, merged(SEARCH, where))))

    def names(end: str) -> list[str]:
        return [file.name for file in BucketFolder(uri).files() if file.name.endswith(end)]

    def running() -> list[str]:
        finished = {name.split("/")[0] for name in names(FINISHED_FILE)}
        logs = [name for name in names("/metrics.jsonl") if name.split("/")[0] not in finished]
        return [name for name in logs if BucketFolder(uri).read(name).count(b"\n") >= 2]

    driver = tune(tmp_path, "first", "--config", "search.yaml")
    while not (names(FINISHED_FILE) and running()) and driver.is_running() and driver.poll() is None:
        time.sleep(0.5)  # the server shares this process
    family = driver.children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL, (tmp_path / "first.log").read_text()
    psutil.wait_procs(family, timeout=30)
    for process in family:
        if process.is_running():
            process.kill()
    (finished,), (begun,) = names(FINISHED_FILE), running()
    kept = BucketFolder(uri).read(begun).split(b"\n")[0]
    checkpoints = {name for name in names(".safetensors") if name.startswith(finished.split("/")[0])}

    second = tune(tmp_path, "second", "--resume", uri)
    log = tmp_path / "second.log"
    assert second.wait() == 0, log.read_text()
    assert f"search folder: {uri}\n" in log.read_text()
    assert f"python -m nuciseg.report {uri}" in log.read_text()
    trials = json.loads(BucketFolder(uri).read("results.json"))
    assert [(trial["epochs"], trial["failure"]) for trial in trials] == [(NUM_EPOCHS, None)] * 2
    assert BucketFolder(uri).read(begun).split(b"\n")[0] == kept, "an interrupted trial was begun anew"
    assert checkpoints <= set(names(".safetensors"))
    assert len(names(FINISHED_FILE)) == 2


def test_two_workers_meet_in_the_bucket_alone(bucket: str, ray_session: None, tmp_path: Path) -> None:
    config = small_config(**{"scale.num_workers": 2, "scale.cpus_per_worker": 1, "tracking.kind": "none"})
    identity = RunIdentity("two", "two", "tests", "train")
    run_training(Job(config, tmp_path / "plain", identity))
    uri = f"{bucket}/runs/two"
    mirror = working_copy(uri, "work")
    run_training(Job(config, mirror.folder, identity, bucket=uri))
    assert logged_epochs(mirror.folder) == [1, 2, 3, 4]
    assert_same_run(mirror.folder, tmp_path / "plain")
    assert_same_run(fetched_to_read(uri), tmp_path / "plain")
    assert (working_copy(uri, "workers").folder / FINISHED_FILE).exists(), "written by workers, fetched by the driver"
