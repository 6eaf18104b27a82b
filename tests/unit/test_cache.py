"""The cache: decoded once whoever asks, keyed by content, mapped read-only, never half there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile

from nuciseg.data.cache import CachedSamples, content_key, default_cache_dir, open_cache
from nuciseg.data.formats import labels
from nuciseg.errors import DataError, ResourceError
from nuciseg.types import Record, Sample

NUM_IMAGES = 40


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for number in range(NUM_IMAGES):
        shape = tuple(rng.integers(5, 40, 2))
        dtype = (np.uint8, np.uint16)[number % 2]
        iio.imwrite(tmp_path / "data/images" / f"{number:02}.png", rng.integers(0, 256, shape).astype(dtype))
        # Ids that need 8, 16 and 32 bits.
        ids_HW = rng.integers(0, (200, 60_000, 70_000)[number % 3], shape)
        ids_HW[0, 0] = -1 if number % 5 == 0 else 0
        tifffile.imwrite(tmp_path / "data/masks" / f"{number:02}.tif", ids_HW.astype(np.int32))
    return labels.read(tmp_path / "data", "train")


def counting_load(record: Record, log: Path, wait_s: float = 0.0) -> Sample:
    """Decode, and leave a line in a real file: what other processes do is seen as well."""
    with log.open("a") as file:
        file.write(record.id + "\n")
    time.sleep(wait_s)
    return labels.load(record)


def test_samples_are_what_load_made(tmp_path: Path, records: list[Record]) -> None:
    cached = open_cache(records, labels.load, format_name="labels", cache_dir=tmp_path / "cache")
    assert len(cached) == NUM_IMAGES
    assert cached.ids == tuple(record.id for record in records)
    assert cached.groups == tuple(record.group for record in records)
    for position, record in enumerate(records):
        expected, sample = labels.load(record), cached[position]
        assert sample.image_HWC.dtype == expected.image_HWC.dtype
        assert sample.labels_HW.dtype == np.int32
        np.testing.assert_array_equal(sample.image_HWC, expected.image_HWC)
        np.testing.assert_array_equal(sample.labels_HW, expected.labels_HW)
        assert cached.shapes[position] == expected.labels_HW.shape
        assert not sample.image_HWC.flags.writeable
    np.testing.assert_array_equal(cached[-1].labels_HW, cached[NUM_IMAGES - 1].labels_HW)
    assert len(list(cached)) == NUM_IMAGES
    size_bytes = (cached.path / "labels.bin").stat().st_size
    assert size_bytes < 4 * sum(height * width for height, width in cached.shapes)


def test_second_open_decodes_nothing(tmp_path: Path, records: list[Record]) -> None:
    load = partial(counting_load, log=tmp_path / "log")
    for _ in range(2):
        open_cache(records, load, format_name="labels", cache_dir=tmp_path / "cache")
    assert sorted((tmp_path / "log").read_text().split()) == [record.id for record in records]


def test_key_follows_the_content(tmp_path: Path, records: list[Record]) -> None:
    key = content_key(records, "labels")
    assert content_key(records, "nucleus") != key
    assert content_key(records[1:], "labels") != key
    assert content_key([Record("other", *_rest(records[0])), *records[1:]], "labels") != key
    moved = tmp_path / "moved"
    (tmp_path / "data").rename(moved)
    moved_records = labels.read(moved, "train")
    assert content_key(moved_records, "labels") == key  # where the files lie is not what they are
    keys = {key}
    for path in (moved_records[3].image_path, moved_records[3].label_paths[0]):
        assert path is not None
        stat = path.stat()
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
        keys.add(content_key(moved_records, "labels"))
    assert len(keys) == 3


def _rest(record: Record) -> tuple[Path | None, tuple[Path, ...], str]:
    return record.image_path, record.label_paths, record.group


def test_changed_file_is_decoded_again(tmp_path: Path, records: list[Record]) -> None:
    cache = tmp_path / "cache"
    before = open_cache(records, labels.load, format_name="labels", cache_dir=cache)
    old = before[0].image_HWC.copy()
    assert records[0].image_path is not None
    iio.imwrite(records[0].image_path, (old[..., 0] + 1).astype(np.uint8))
    after = open_cache(records, labels.load, format_name="labels", cache_dir=cache)
    assert after.path != before.path
    np.testing.assert_array_equal(after[0].image_HWC, (old + 1).astype(np.uint8))
    np.testing.assert_array_equal(before[0].image_HWC, old)


def test_drawn_samples_are_keyed_by_their_id(tmp_path: Path) -> None:
    def draw(record: Record) -> Sample:
        return Sample(np.full((4, 5, 1), int(record.id), np.uint8), np.ones((4, 5), np.int32))

    drawn = [Record(str(number), None, (), str(number)) for number in range(3)]
    cached = open_cache(drawn, draw, format_name="synthetic", cache_dir=tmp_path)
    assert [int(sample.image_HWC.max()) for sample in cached] == [0, 1, 2]
    assert content_key(drawn[:2], "synthetic") != content_key(drawn[1:], "synthetic")


def test_pickle_is_a_path(tmp_path: Path, records: list[Record]) -> None:
    cached = open_cache(records, labels.load, format_name="labels", cache_dir=tmp_path / "cache")
    data = pickle.dumps(cached)
    assert len(data) < 10_000
    again: CachedSamples = pickle.loads(data)
    assert again.ids == cached.ids
    np.testing.assert_array_equal(again[7].image_HWC, cached[7].image_HWC)


def _open_in_child(records: list[Record], cache: Path, log: Path, barrier: object, wait_s: float) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    cached = open_cache(records, partial(counting_load, log=log, wait_s=wait_s), format_name="labels", cache_dir=cache)
    np.testing.assert_array_equal(cached[5].labels_HW, labels.load(records[5]).labels_HW)


def test_three_processes_build_once(tmp_path: Path, records: list[Record]) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    arguments = (records, tmp_path / "cache", tmp_path / "log", barrier, 0.01)
    children = [context.Process(target=_open_in_child, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == [record.id for record in records]


def test_killed_builder_leaves_nothing_that_passes_for_whole(tmp_path: Path, records: list[Record]) -> None:
    context = multiprocessing.get_context("fork")
    cache, log = tmp_path / "cache", tmp_path / "log"
    child = context.Process(target=_open_in_child, args=(records, cache, log, context.Barrier(1), 0.2))
    child.start()
    deadline = time.monotonic() + 30
    while not (log.exists() and len(log.read_text().split()) > 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert len(log.read_text().split()) < NUM_IMAGES
    key = content_key(records, "labels")
    assert not (cache / key).exists()
    assert list(cache.glob(f"{key}.tmp-*"))

    cached = open_cache(records, labels.load, format_name="labels", cache_dir=cache)
    np.testing.assert_array_equal(cached[39].labels_HW, labels.load(records[39]).labels_HW)
    assert not list(cache.glob(f"{key}.tmp-*"))


def test_one_corrupt_image_among_many_is_named(tmp_path: Path, records: list[Record]) -> None:
    path = records[21].image_path
    assert path is not None
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"images/21\.png cannot be read"):
        open_cache(records, labels.load, format_name="labels", cache_dir=tmp_path / "cache")
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] in ([".lock"], [])


def test_memory_of_a_build_is_flat(tmp_path: Path) -> None:
    import tracemalloc

    def draw(record: Record) -> Sample:
        return Sample(np.zeros((256, 256, 1), np.uint8), np.zeros((256, 256), np.int32))

    peaks = []
    for count in (50, 400):
        drawn = [Record(f"{count}-{number}", None, (), "") for number in range(count)]
        tracemalloc.start()
        open_cache(drawn, draw, format_name="synthetic", cache_dir=tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 3_000_000  # 350 more images are 115 MB of samples


def test_truncated_or_foreign_entry_is_refused(tmp_path: Path, records: list[Record]) -> None:
    cached = open_cache(records, labels.load, format_name="labels", cache_dir=tmp_path / "cache")
    images = cached.path / "images.bin"
    os.truncate(images, images.stat().st_size - 1)
    with pytest.raises(DataError, match="truncated; delete"):
        CachedSamples(cached.path)
    (cached.path / "index.json").write_text("{")
    with pytest.raises(DataError, match="cannot be opened"):
        CachedSamples(cached.path)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path, records: list[Record]) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ResourceError, match=r"cache folder \S+file cannot be written .* NUCISEG_CACHE"):
        open_cache(records, labels.load, format_name="labels", cache_dir=tmp_path / "file")


def test_missing_files_and_no_records(tmp_path: Path, records: list[Record]) -> None:
    records[0].label_paths[0].unlink()
    with pytest.raises(DataError, match=r"masks/00\.tif cannot be read"):
        open_cache(records, labels.load, format_name="labels", cache_dir=tmp_path)
    with pytest.raises(DataError, match="no images"):
        open_cache([], labels.load, format_name="labels", cache_dir=tmp_path)


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: list[Record]) -> None:
    for name in ("NUCISEG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "nuciseg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "nuciseg"
    monkeypatch.setenv("NUCISEG_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    assert open_cache(records, labels.load, format_name="labels").path.parent == tmp_path / "own"
