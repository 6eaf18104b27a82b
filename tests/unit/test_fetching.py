"""Data sets in a bucket of a real S3 server: fetched once, checked, and what cannot be fetched is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from gcs_server import serving_gcs
from s3_server import demand_permission, make_bucket, put, upload_folder, use_server

from nuciseg import buckets
from nuciseg.buckets import BucketFolder
from nuciseg.config import DataConfig, load_config
from nuciseg.data import fetching
from nuciseg.data.fetching import local_folder
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.engine.datasets import open_samples
from nuciseg.errors import ConfigError, DataError, ResourceError


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    use_server(server, monkeypatch)
    return make_bucket(server)


@pytest.fixture
def uri(bucket: str, tmp_path: Path) -> str:
    """A small data set in a bucket; the same files lie in `tmp_path/data`."""
    write_nucleus_folder(SyntheticConfig(num_train=2, num_test=1, mean_diameter_px=20.0), tmp_path / "data")
    upload_folder(tmp_path / "data", f"s3://{bucket}/sets/nuclei")
    return f"s3://{bucket}/sets/nuclei"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ctime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_copy_equals_the_data_set(uri: str, tmp_path: Path) -> None:
    folder = local_folder(uri, tmp_path / "cache")
    assert contents(folder) == contents(tmp_path / "data")
    assert folder.is_relative_to(tmp_path / "cache" / "fetched")
    assert local_folder(f"{uri}/", tmp_path / "cache") == folder
    assert local_folder(tmp_path / "data") == tmp_path / "data"


def test_it_is_fetched_once_and_again_when_it_changed(uri: str, tmp_path: Path) -> None:
    folder = local_folder(uri, tmp_path / "cache")
    before = times(folder)
    assert local_folder(uri, tmp_path / "cache") == folder
    assert times(folder) == before
    put(f"{uri}/note.txt", b"new")
    changed = local_folder(uri, tmp_path / "cache")
    assert changed != folder
    assert contents(changed) == {**contents(tmp_path / "data"), "note.txt": b"new"}


def put_large(uri: str, how: str, data: bytes, folder: Path) -> None:
    (folder / "large").write_bytes(data)
    if how == "pyarrow":
        BucketFolder(uri).upload(folder / "large", "large")
    elif how == "in parts":
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        parts = TransferConfig(multipart_threshold=8 * 2**20, multipart_chunksize=8 * 2**20)
        boto3.client("s3").upload_file(str(folder / "large"), bucket, f"{key}/large", Config=parts)
    else:
        BucketFolder(uri).write("large", data) if uri.startswith("gs") else put(f"{uri}/large", data)


@pytest.mark.parametrize("how", ["whole", "in parts", "pyarrow", "gs"])
def test_what_came_damaged_is_noticed(bucket: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(20 * 2**20 + 5)
    with serving_gcs(monkeypatch) if how == "gs" else nullcontext(f"s3://{bucket}") as storage:
        put_large(f"{storage}/set", how, data, tmp_path)
        read, copy = fetching._read, fetching._copy
        num_damaged, damaged, copies = 0, [], []

        def reading(stream: object, uri: str) -> bytes:
            chunk = read(stream, uri)
            if len(damaged) < num_damaged and chunk:
                damaged.append(uri)
                # Google's hash counts more than two copies that are damaged alike.
                return (b"x" if how == "gs" else os.urandom(1)) * len(chunk)
            return chunk

        monkeypatch.setattr(fetching, "_read", reading)
        monkeypatch.setattr(fetching, "_copy", lambda *words: copies.append(words) or copy(*words))
        for num_damaged in (0, 1):
            copies.clear()
            assert contents(local_folder(f"{storage}/set", tmp_path / f"{num_damaged}")) == {"large": data}
            assert len(copies) == 1 + num_damaged, "known by its hash"
        num_damaged = 100
        with pytest.raises(ResourceError, match="/set/large comes damaged, each time otherwise; check the network"):
            local_folder(f"{storage}/set", tmp_path / "always")


def test_samples_of_a_bucket_are_those_of_the_folder(uri: str, tmp_path: Path) -> None:
    config = load_config(overrides={"data": {"root": uri, "cache_dir": str(tmp_path / "cache")}}).data
    assert config.root == uri
    there = open_samples(config, "train")
    here = open_samples(DataConfig(root=tmp_path / "data", cache_dir=tmp_path / "cache"), "train")
    assert there.path == here.path, "the same contents are decoded once"


@pytest.mark.parametrize("how", ["changed", "truncated", "gone"])
def test_a_damaged_copy_is_fetched_again(uri: str, tmp_path: Path, how: str) -> None:
    folder = local_folder(uri, tmp_path / "cache")
    path = next(path for path in sorted(folder.rglob("*.png")))
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "truncated" else bytes([data[0] ^ 1]) + data[1:])
    assert contents(local_folder(uri, tmp_path / "cache")) == contents(tmp_path / "data")


def test_a_touched_copy_is_read_and_kept(uri: str, tmp_path: Path) -> None:
    folder = local_folder(uri, tmp_path / "cache")
    path = next(folder.rglob("*.png"))
    os.utime(path, ns=(1, 1))
    local_folder(uri, tmp_path / "cache")
    assert path.stat().st_mtime_ns == 1


FETCH = """
import sys
from pathlib import Path
from nuciseg.data.fetching import local_folder
print("ready", flush=True)
sys.stdin.readline()
print(local_folder(sys.argv[1], Path(sys.argv[2])), flush=True)
"""


def fetching_process(uri: str, cache: Path) -> subprocess.Popen[str]:
    """A process that fetches once a line is written to it."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", FETCH, uri, str(cache)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_that_ask_at_once_fetch_once(uri: str, tmp_path: Path) -> None:
    processes = [fetching_process(uri, tmp_path / "cache") for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    folders = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert folders[0] == folders[1] != ""
    arrived = times(Path(folders[0]))
    assert local_folder(uri, tmp_path / "cache") == Path(folders[0])
    assert times(Path(folders[0])) == arrived
    assert len(list((tmp_path / "cache" / "fetched").glob("*.json"))) == 1


def test_a_killed_fetcher_leaves_nothing_that_passes_for_whole(bucket: str, tmp_path: Path) -> None:
    large = {f"{number}.bin": os.urandom(2**20) for number in range(40)}
    for name, data in large.items():
        put(f"s3://{bucket}/large/{name}", data)
    process = fetching_process(f"s3://{bucket}/large", tmp_path / "cache")
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("fetched/*.tmp-*/*.bin")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=30)
    assert list((tmp_path / "cache").glob("fetched/*.tmp-*"))
    assert not list((tmp_path / "cache").glob("fetched/*.json"))
    assert contents(local_folder(f"s3://{bucket}/large", tmp_path / "cache")) == large
    assert not list((tmp_path / "cache").glob("fetched/*.tmp-*"))


def test_what_cannot_be_fetched_is_one_sentence(
    server: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError, match=r"^s3://nowhere-at-all/x: there is no bucket 'nowhere-at-all'; check"):
        local_folder("s3://nowhere-at-all/x", tmp_path)
    with pytest.raises(DataError, match=rf"^s3://{bucket}/nothing holds no files; check data.root.$"):
        local_folder(f"s3://{bucket}/nothing", tmp_path)
    demand_permission(server, True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    buckets._s3.cache_clear()
    try:
        with pytest.raises(ResourceError, match=rf"^s3://{bucket}/x: access is denied: there are no credentials, or"):
            local_folder(f"s3://{bucket}/x", tmp_path)
    finally:
        demand_permission(server, False)
    use_server("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ResourceError, match=rf"^s3://{bucket}/x: the storage cannot be reached \(.*127.0.0.1.*check"):
        local_folder(f"s3://{bucket}/x", tmp_path)


def test_a_cache_that_cannot_be_written_is_named(uri: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cache folder \S+/file/fetched cannot be written .* data.cache_dir"):
        local_folder(uri, tmp_path / "file")


def test_an_object_that_would_leave_its_folder_is_refused(server: str, bucket: str, tmp_path: Path) -> None:
    put(f"s3://{bucket}/set/../../x", b"x")
    with pytest.raises(ResourceError, match=r"has an object '\S+x', which would be written outside of its folder"):
        local_folder(f"s3://{bucket}/set", tmp_path / "cache")


@pytest.mark.parametrize("value", ["http://host/folder", "s3://", "s3a://bucket/x"])
def test_other_addresses_are_no_storage(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^flags: data.root is '\S+': no such storage; give a folder, s3://BUCKET"):
        load_config(overrides={"data": {"root": value}})


def test_a_wrong_type_is_named_once() -> None:
    with pytest.raises(
        ConfigError, match=r"^flags: data.root is 3: give a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER$"
    ):
        load_config(overrides={"data": {"root": 3}})


def test_runs_may_lie_in_a_bucket() -> None:
    where = [load_config(overrides={"run": {"storage_path": text}}).run.storage_path for text in ("s3://b/x", "x")]
    assert where == ["s3://b/x", Path("x")]
