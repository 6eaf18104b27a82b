"""Images predicted by a pool of real Ray actors: the same files as in one process, whatever happens on the way."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from predict_verb import predict, read_summary_rows, write_fields
from ray.util.state import list_actors
from small_runs import wait_until

from nuciseg.distributed import prediction
from nuciseg.distributed.prediction import predict_files
from nuciseg.engine.checkpoint import find_checkpoint
from nuciseg.engine.files import Request
from nuciseg.errors import ResourceError

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(autouse=True)
def _places_are_free_again() -> Iterator[None]:
    """Ray Data lets go of a pool that was left in the middle when Python collects it; later tests want all CPUs."""
    yield
    gc.collect()
    all_cpus = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU") == all_cpus, "the places of the pool", 60)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_fields(tmp_path_factory.mktemp("batch"), 5)


def send(pid: int, signal_: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended since it was seen
        os.kill(pid, signal_)


def kill_within_an_image(out: Path, at_most: int) -> None:
    """SIGKILL to so many of the pool's processes at a moment when each that has begun has an image in work."""

    def are_killed() -> bool:
        pids = sorted(actor_pids())
        for pid in pids:
            send(pid, signal.SIGSTOP)
        within = 0 < len(pids) <= len(list(out.glob(".*.tmp")))
        for number, pid in enumerate(pids):
            send(pid, signal.SIGKILL if within and number < at_most else signal.SIGCONT)
        return within

    wait_until(are_killed, "processes within an image", limit_s=120)


def files_in(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "summary.csv"}


def actor_pids() -> set[int]:
    actors = list_actors(address=ray.get_runtime_context().gcs_address, limit=1000)  # of no other Ray on this machine
    return {a.pid for a in actors if "_PredictingActor" in a.class_name and a.pid and a.state == "ALIVE"}


@pytest.fixture
def killer() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Runs a function beside the test, which fails where that does."""
    failures: list[BaseException] = []
    threads: list[threading.Thread] = []

    def start(what: Callable[[], None]) -> None:
        def run() -> None:
            try:
                what()
            except BaseException as error:  # noqa: BLE001  # handed to the test
                failures.append(error)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[0].start()

    yield start
    threads[0].join(timeout=130)
    assert not threads[0].is_alive()
    assert not failures


def test_a_pool_writes_what_one_process_writes(
    tiny_fields_run: Path, fields: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.tif"
    bad.write_bytes(fields[0].read_bytes()[:500])
    words = ["--checkpoint", tiny_fields_run, *fields[:3], bad, *fields[3:], "--rois", "--geojson"]
    assert predict(*words, "--out", tmp_path / "alone") == 2
    alone = capsys.readouterr()
    assert predict(*words, "--out", tmp_path / "pool", "--workers", "2") == 2
    pool = capsys.readouterr()
    assert len(files_in(tmp_path / "pool")) == 5 * 5 + 1
    assert files_in(tmp_path / "pool") == files_in(tmp_path / "alone")
    assert (tmp_path / "pool" / "summary.csv").read_bytes() == (tmp_path / "alone" / "summary.csv").read_bytes()
    assert sorted(pool.out.splitlines()[:-1]) == sorted(alone.out.splitlines()[:-1])
    assert pool.err == alone.err
    assert [row["status"] for row in read_summary_rows(tmp_path / "pool")] == ["done"] * 3 + ["failed"] + ["done"] * 2


def test_a_pool_may_be_used_in_any_thread(tiny_fields_run: Path, fields: list[Path], tmp_path: Path) -> None:
    """Only the main thread may set a signal's handler, which the pool puts back after Ray has set its own."""
    request = Request(("masks",), tmp_path / "out")
    with ThreadPoolExecutor() as threads:
        found = threads.submit(list, predict_files(fields, find_checkpoint(tiny_fields_run), request, num_workers=2))
        assert len(found.result()) == len(fields)


def test_results_come_as_they_are_finished(tiny_fields_run: Path, fields: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = write_fields(tmp_path / "many", 24, side_px=300)
    results = predict_files(paths, find_checkpoint(tiny_fields_run), Request(("masks",), out), num_workers=2)
    next(results)
    assert len(list(out.glob("*_masks.tif"))) < len(paths), "the first result is there before the last image is done"
    assert len(list(results)) == len(paths) - 1


def test_a_folder_that_cannot_be_written_ends_the_batch(
    tiny_fields_run: Path, fields: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    request = Request(("masks",), tmp_path / "file")
    with pytest.raises(ResourceError, match=r"file cannot be written \(File exists\)"):
        list(predict_files(fields, find_checkpoint(tiny_fields_run), request, num_workers=2))


def test_more_workers_than_room_is_one_sentence(
    tiny_fields_run: Path, fields: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", tiny_fields_run, *fields, "--out", tmp_path / "out"]
    assert predict(*words, "--workers", "5") == 2
    said = capsys.readouterr().err
    assert said.startswith("nuciseg: --workers is 5 with 1 CPUs and 0 GPUs each, but the cluster")
    assert "has room for 4 such workers; give fewer" in said


def test_an_actor_that_is_killed_is_started_again(
    tiny_fields_run: Path, tmp_path: Path, killer: Callable[[Callable[[], None]], None]
) -> None:
    paths = write_fields(tmp_path / "many", 8, side_px=1200)  # each takes a second, more than one look
    out = tmp_path / "out"
    killer(lambda: kill_within_an_image(out, at_most=1))
    request = Request(("masks", "measurements"), out)
    found = list(predict_files(paths, find_checkpoint(tiny_fields_run), request, num_workers=2))
    assert sorted(result.row.file for result in found) == [str(path) for path in paths]
    assert all(result.row.summary is not None for result in found)
    alone = Request(request.outputs, tmp_path / "alone")
    list(predict_files(paths, find_checkpoint(tiny_fields_run), alone))
    assert {path.name: path.read_bytes() for path in out.glob("field_*")} == files_in(alone.out)


def test_a_pool_whose_processes_die_ends_with_a_sentence(
    tiny_fields_run: Path,
    tmp_path: Path,
    killer: Callable[[Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the first death, to save the time of starting others."""
    monkeypatch.setattr(prediction, "NUM_RETRIES", 0)
    paths = write_fields(tmp_path / "many", 8, side_px=1200)  # each takes a second, more than one look
    out = tmp_path / "out"

    killer(lambda: kill_within_an_image(out, at_most=2))
    request = Request(("masks",), out)
    with pytest.raises(ResourceError, match=r"a process that predicted ended 1 times on one image.* fewer --workers"):
        list(predict_files(paths, find_checkpoint(tiny_fields_run), request, num_workers=2))
