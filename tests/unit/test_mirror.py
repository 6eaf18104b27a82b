"""Copies of runs in a bucket of a real S3 server: what is saved in which order, fetched, left out, waited for."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from s3_server import demand_permission, make_bucket, put, serving_s3, use_server

from nuciseg import buckets, patience
from nuciseg.buckets import BucketFolder
from nuciseg.data.cache import default_cache_dir
from nuciseg.distributed import mirror as module
from nuciseg.distributed.mirror import COPIES, Mirror, fetched_to_read, opened, working_copy
from nuciseg.distributed.storage import _what_is_wrong_in_bucket, require_shared
from nuciseg.errors import ResourceError, StorageAwayError


@pytest.fixture
def uri(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a run that does not exist yet."""
    use_server(server, monkeypatch)
    return f"s3://{make_bucket(server)}/runs/mine"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def stored(uri: str) -> dict[str, str]:
    bucket = BucketFolder(uri)
    return {file.name: bucket.read(file.name).decode() for file in bucket.files()}


CHECKPOINT = {"checkpoints/epoch-0001/weights.safetensors": "w", "checkpoints/epoch-0001/checkpoint.json": "{}"}


def test_a_plain_folder_is_left_alone(tmp_path: Path) -> None:
    plain = opened(tmp_path)
    write(tmp_path, CHECKPOINT)
    plain.push()
    plain.fetch()
    assert contents(tmp_path) == CHECKPOINT
    assert (str(plain), plain.shown(tmp_path / "x")) == (str(tmp_path), str(tmp_path / "x"))


def test_what_was_pushed_is_fetched_elsewhere(uri: str, tmp_path: Path) -> None:
    here, there = Mirror(tmp_path / "a", uri), Mirror(tmp_path / "b", uri)
    write(here.folder, {**CHECKPOINT, "metrics.jsonl": "1\n", ".half": "x", "wandb/run/x.wandb": "log"})
    (here.folder / "wandb" / "latest").symlink_to("run")
    here.push()
    there.fetch()
    assert contents(there.folder) == {**CHECKPOINT, "metrics.jsonl": "1\n", "wandb/run/x.wandb": "log"}
    shutil.rmtree(there.folder / "checkpoints")
    write(there.folder, {"metrics.jsonl": "1\n2\n", "finished.json": "{}"})
    there.push()
    assert stored(uri) == {"metrics.jsonl": "1\n2\n", "finished.json": "{}", "wandb/run/x.wandb": "log"}
    write(here.folder, {"never_saved": "x"})
    here.fetch()
    assert contents(here.folder) == {**stored(uri), ".half": "x"}


def test_what_is_the_same_is_not_moved_again(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(tmp_path / "a", uri)
    write(mirror.folder, CHECKPOINT)
    mirror.push()
    moved: list[str] = []
    monkeypatch.setattr(BucketFolder, "upload", lambda self, path, name: moved.append(name))
    monkeypatch.setattr(module, "fetch_file", lambda bucket, file, path: moved.append(file.name))
    mirror.push()
    mirror.fetch()
    assert not moved
    os.utime(mirror.folder / "checkpoints/epoch-0001/checkpoint.json")
    mirror.push()
    assert moved == ["checkpoints/epoch-0001/checkpoint.json"]


def test_a_torn_index_costs_a_second_fetch(uri: str, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "a", uri)
    write(mirror.folder, CHECKPOINT)
    mirror.push()
    index = max((default_cache_dir() / COPIES / "index").glob("*.json"), key=os.path.getmtime)
    os.truncate(index, 20)
    mirror.fetch()
    assert contents(mirror.folder) == CHECKPOINT


def test_files_go_in_an_order_that_never_lies(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(tmp_path / "a", uri)
    write(mirror.folder, {**CHECKPOINT, "metrics.jsonl": "1\n"})
    mirror.push()
    shutil.rmtree(mirror.folder / "checkpoints")
    newer = {name.replace("1/", "2/"): text for name, text in CHECKPOINT.items()}
    write(mirror.folder, newer)
    write(mirror.folder, {"metrics.jsonl": "1\n2\n"})
    os.utime(mirror.folder / "metrics.jsonl", (1, 1))
    write(mirror.folder, {"finished.json": "{}"})
    done: list[tuple[str, str]] = []
    upload, delete = BucketFolder.upload, BucketFolder.delete

    def noted_upload(self: BucketFolder, path: Path, name: str) -> None:
        upload(self, path, name)
        done.append(("put", name))

    def noted_delete(self: BucketFolder, name: str) -> None:
        delete(self, name)
        done.append(("delete", name))

    monkeypatch.setattr(BucketFolder, "upload", noted_upload)
    monkeypatch.setattr(BucketFolder, "delete", noted_delete)
    mirror.push()
    assert done == [
        ("put", "checkpoints/epoch-0002/weights.safetensors"),
        ("put", "checkpoints/epoch-0002/checkpoint.json"),
        ("put", "metrics.jsonl"),
        ("put", "finished.json"),
        ("delete", "checkpoints/epoch-0001/checkpoint.json"),
        ("delete", "checkpoints/epoch-0001/weights.safetensors"),
    ]
    done.clear()
    write(mirror.folder, {"checkpoints/epoch-0002/weights.safetensors": "other"})
    mirror.push()
    assert done == [
        ("delete", "checkpoints/epoch-0002/checkpoint.json"),
        ("put", "checkpoints/epoch-0002/weights.safetensors"),
        ("put", "checkpoints/epoch-0002/checkpoint.json"),
    ]


def test_a_half_uploaded_checkpoint_is_not_taken(uri: str, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "a", uri)
    write(mirror.folder, CHECKPOINT)
    mirror.push()
    put(f"{uri}/checkpoints/epoch-0002/weights.safetensors", b"half")
    other = Mirror(tmp_path / "b", uri)
    other.fetch()
    assert contents(other.folder) == CHECKPOINT


def test_a_search_has_its_own_files_and_marks(uri: str, tmp_path: Path) -> None:
    search = Mirror(tmp_path / "a", uri, below=False)
    trial = search.inner("trial")
    write(search.folder, {"config.yaml": "c", "trial/sample.json": "{}"})
    search.push()
    assert stored(uri) == {"config.yaml": "c"}
    trial.push()
    search.fetch()
    assert stored(uri) == contents(search.folder) == {"config.yaml": "c", "trial/sample.json": "{}"}
    for each in (search, Mirror(tmp_path / "plain")):
        each.folder.mkdir(exist_ok=True)
        assert each.marks(".closed") == set()
        each.mark(".closed", "a")
        each.mark(".closed", "b")
        assert each.marks(".closed") == {"a", "b"}
        each.unmark(".closed")
        assert each.marks(".closed") == set()


def test_a_note_reaches_the_other_side(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXCHANGE_S", 0.05)
    driver, worker = Mirror(tmp_path / "a", uri), Mirror(tmp_path / "b", uri)
    write(driver.folder, {"config.yaml": "c"})
    driver.push()
    with driver.exchanging(sent=("stop",), received=("metrics.jsonl",)), worker.exchanging(received=("stop",)):
        write(driver.folder, {"stop": ""})
        write(worker.folder, {"metrics.jsonl": "1\n"})
        worker.push()
        deadline = time.monotonic() + 20
        while not ((worker.folder / "stop").exists() and (driver.folder / "metrics.jsonl").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert (driver.folder / "metrics.jsonl").read_text() == "1\n"
    assert not [thread for thread in threading.enumerate() if thread.name == "nuciseg-exchange"]


def test_storage_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "NUM_ATTEMPTS", 1)
    with serving_s3() as address:
        use_server(address, monkeypatch)
        uri = f"s3://{make_bucket(address)}/runs/mine"
        mirror = Mirror(tmp_path / "a", uri)
        write(mirror.folder, {"config.yaml": "c"})
        mirror.push()
    write(mirror.folder, CHECKPOINT)
    monkeypatch.setattr(patience, "WAITS_S", (0.0,))
    with pytest.raises(StorageAwayError, match=rf"^{uri}\S*: the storage cannot be reached \(.*check the network"):
        mirror.push()
    monkeypatch.setattr(patience, "WAITS_S", (1.0,))
    with contextlib.ExitStack() as again:
        back = partial(again.enter_context, serving_s3(int(address.rsplit(":", 1)[-1])))
        monkeypatch.setattr(patience.time, "sleep", lambda seconds: back())
        mirror.push()
        assert stored(uri) == {**CHECKPOINT, "config.yaml": "c"}


def test_what_cannot_be_opened_is_one_sentence(uri: str) -> None:
    with pytest.raises(ResourceError, match=r"^s3://no-such-bucket/x: there is no bucket 'no-such-bucket'; check"):
        opened("s3://no-such-bucket/x")
    with pytest.raises(ResourceError, match=rf"^{uri} holds no files; give the address that train or tune printed$"):
        fetched_to_read(uri)


def test_a_node_says_what_is_wrong_with_the_bucket(server: str, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_shared(uri)  # this machine alone: no Ray is there
    BucketFolder(uri).write(".probe", b"token")
    assert _what_is_wrong_in_bucket(uri, ".probe") is None
    assert stored(uri) == {".probe": "token"}
    demand_permission(server, True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    buckets._s3.cache_clear()
    try:
        assert (_what_is_wrong_in_bucket(uri, ".probe") or "").startswith(f"cannot use it ({uri}/.probe: access is den")
    finally:
        demand_permission(server, False)


def test_copies_of_one_run_do_not_meet(uri: str) -> None:
    copies = [working_copy(uri, "work"), working_copy(uri, "workers"), working_copy(f"{uri}2", "work")]
    assert len({copy.folder for copy in copies}) == 3
    assert working_copy(f"{uri}/", "work") == copies[0]
    assert copies[0].folder.name == "mine"
