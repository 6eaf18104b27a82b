"""Runs in a bucket of a real server of S3, or of Google's storage, on machines that have nothing of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from gcs_server import serving_gcs
from s3_server import demand_permission, make_bucket, use_server
from small_runs import SMALL, assert_same_run, logged_epochs, wait_until

from nuciseg import buckets, evaluate, report, train
from nuciseg.buckets import BucketFolder
from nuciseg.cli import run_verb
from nuciseg.config import merged
from nuciseg.distributed import worker
from nuciseg.distributed.failures import ask_to_stop
from nuciseg.distributed.mirror import fetched_to_read, working_copy

NUM_EPOCHS = 8


@pytest.fixture
def bucket(
    request: pytest.FixtureRequest, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of a new bucket, in S3 unless the test is given "gs"; the working folder holds run.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(merged(SMALL, {"train": {"epochs": NUM_EPOCHS}})))
    on_a_new_machine(monkeypatch, tmp_path / "cache")
    if getattr(request, "param", "s3") == "gs":
        with serving_gcs(monkeypatch) as uri:
            yield uri
    else:
        use_server(server, monkeypatch)
        yield f"s3://{make_bucket(server)}"


def on_a_new_machine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("NUCISEG_CACHE", str(cache))


def answer(main: Callable[[list[str]], None], *words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main(list(words)))
    return int(str(exit_.value.code))


def names_in(uri: str) -> list[str]:
    return [file.name for file in BucketFolder(uri).files()]


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_a_stopped_run_goes_on_elsewhere_as_if_nothing_had_happened(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"{bucket}/runs/mine"
    where = ["--run.storage_path", f"{bucket}/runs", "--run.name", "mine"]
    copy = working_copy(uri, "work").folder

    def stop() -> None:
        wait_until(lambda: len(logged_epochs(copy)) >= 2, "two epochs")
        ask_to_stop(copy)

    monkeypatch.setattr(worker, "LOOK_S", 0.0)  # else it would have ended before it looked whether to stop
    stopping = threading.Thread(target=stop)
    stopping.start()
    assert answer(train.main, "--config", "run.yaml", *where) == 143
    stopping.join()
    assert f"go on with --resume {uri}" in capsys.readouterr().err
    assert {"failure.json", "metrics.jsonl", "split.json"} <= set(names_in(uri))
    assert BucketFolder(uri).read("metrics.jsonl").count(b"\n") < NUM_EPOCHS
    # Of a checkpoint whose writer died in the middle.
    BucketFolder(uri).write(f"checkpoints/epoch-{NUM_EPOCHS - 1:04d}/weights.safetensors", b"half")

    on_a_new_machine(monkeypatch, tmp_path / "elsewhere")
    assert answer(train.main, "--resume", uri) == 0
    said = capsys.readouterr().out
    assert f"run folder: {uri}\n" in said
    assert f"best checkpoint: {uri}/checkpoints/epoch-" in said
    assert answer(train.main, "--config", "run.yaml", "--run.name", "undisturbed") == 0
    on_a_new_machine(monkeypatch, tmp_path / "third")
    fetched = fetched_to_read(uri)
    assert_same_run(fetched, Path("runs/undisturbed"))
    assert (fetched / "finished.json").exists()
    assert "failure.json" not in names_in(uri)
    assert answer(evaluate.main, "--checkpoint", uri, "--split", "validation") == 0
    assert Path("evaluation-mine-validation/scores.json").exists()
    assert answer(report.main, uri, "--out", "page.html") == 0
    assert answer(train.main, *where) == 2
    assert f"{uri} exists already; go on with it by --resume {uri}, or" in capsys.readouterr().err
    assert not Path(bucket.split("/")[0]).exists()


def test_what_cannot_be_written_to_ends_in_one_sentence(
    server: str, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert answer(train.main, *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    new = ["--config", "run.yaml", "--run.storage_path"]
    assert "there is no such bucket; check its name, or make it" in refused(*new, "s3://no-such-bucket/runs")
    assert refused("--resume", f"{bucket}/none").startswith(f"nuciseg: --resume {bucket}/none: no run there")
    assert "no such storage; give a folder, s3://BUCKET/FOLDER" in refused("--resume", "http://host/run")
    demand_permission(server, True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    buckets._s3.cache_clear()
    try:
        assert "access is denied: there are no credentials" in refused(*new, f"{bucket}/runs")
    finally:
        demand_permission(server, False)
    monkeypatch.setattr(buckets, "NUM_ATTEMPTS", 1)
    use_server("http://127.0.0.1:9", monkeypatch)
    assert "the storage cannot be reached" in refused(*new, f"{bucket}/runs")
    assert "the storage cannot be reached" in refused("--resume", f"{bucket}/runs/mine")
    assert set(os.listdir()) == {"run.yaml", "cache"}, "no folder is left behind"
