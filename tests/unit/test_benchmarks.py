"""Each benchmark runs and ends with its ratios. Sizes are tiny: no figure here means anything."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from small_runs import SMALL, logged_epochs

from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder, write_nucleus_folder
from nuciseg.images import read_labels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = "--crop-px 32 --batch-size 2 --steps 1 --rounds 1 --threads 1 --precision fp32"

# One epoch of nuciseg, one step of StarDist; any score reaches the target.
ONE_EPOCH = (
    *("--target", "0", "--cores", "1", "--epochs", "1", "--steps", "1", "--train.epochs", "1", "--data.crop_px", "64"),
    *("--data.batch_size", "2", "--model.pretrained", "none", "--model.encoder", "resnet10t"),
)

needs_bench = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lightning", "segmentation_models_pytorch")),
    reason="needs pip install -e '.[bench]'",
)
needs_stardist = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("stardist", "tensorflow")),
    reason="needs pip install -e '.[bench]'",
)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fields")
    write_labels_folder(SyntheticConfig(num_train=8, num_test=2, mean_diameter_px=24), root)
    return root


def throughput(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), *TINY.split(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@needs_bench
def test_throughput_ends_with_its_ratios() -> None:
    done = throughput("--workers", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["lightning_workers"] == 1
    rates = result["images_per_s"]
    # Of one round the ratio of the medians is the median of the ratios.
    assert result["loop_vs_bare"] == pytest.approx(rates["loop"] / rates["bare"], rel=0.02)
    assert result["vs_lightning"] == pytest.approx(rates["loop"] / rates["lightning"], rel=0.02)
    assert result["vs_lightning_channels_last"] > 0


@needs_bench
def test_throughput_names_a_missing_folder() -> None:
    done = throughput("--data.root", "no/such/folder")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "The data folder no/such/folder does not exist; check data.root."
    assert "Traceback" not in done.stderr


def test_loader_ends_with_a_ratio_for_each_number_of_threads() -> None:
    tiny = ("--encoder", "resnet10t", "--crop-px", "32", "--batch-size", "2", "--steps", "2", "--rounds", "1")
    result = result_of(run("loader.py", *tiny, "--precision", "fp32", "--loader-threads", "0", "2"))
    assert set(result["loop_vs_bare"]) == {"0", "2"}
    assert all(ratio > 0 for ratio in result["loop_vs_bare"].values())
    assert result["precision"] == "float32"


@pytest.mark.slow
def test_the_ablation_ends_with_its_ratios(tmp_path: Path) -> None:
    write_nucleus_folder(SyntheticConfig(num_train=12, num_test=1), tmp_path / "data")
    command = [
        *(sys.executable, str(BENCHMARKS / "ablation.py"), "--data.root", str(tmp_path / "data")),
        *("--splits", "1", "--jobs", "2", "--model.encoder", "resnet10t", "--model.pretrained", "none"),
        *("--data.cache_dir", str(tmp_path / "cache"), "--train.epochs", "1"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert sum(line.startswith("split 1, joined") for line in lines) == 4
    parts = ("join", "min_nuclei", "border_share", "min_area_px")
    assert set(json.loads(last)) == {f"vs_no_{part}{many}" for part in parts for many in ("", "_many")}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # TensorFlow starts three times and compiles each time
@needs_stardist
def test_the_benchmarks_against_stardist_end_with_their_ratios(fields: Path, tmp_path: Path) -> None:
    command = ("time_to_accuracy.py", fields, "--out", tmp_path, *ONE_EPOCH, "--data.cache_dir", tmp_path / "cache")
    result = result_of(run(*command))
    assert result["vs_stardist"] == pytest.approx(
        result["stardist"]["minutes"] / result["nuciseg"]["minutes"], rel=0.05
    )
    assert result["vs_stardist_without_validation"] > result["vs_stardist"] > 0
    assert not result["cut_off"]
    assert len((tmp_path / "validation.txt").read_text().splitlines()) == 1
    logs = [tmp_path / "nuciseg" / "metrics.jsonl", tmp_path / "stardist_grid_2.jsonl"]
    before = [log.stat().st_mtime_ns for log in logs]
    assert result_of(run(*command)) == result
    assert [log.stat().st_mtime_ns for log in logs] == before, "trained again"

    found = result_of(run("inference.py", fields, "--checkpoint", tmp_path / "nuciseg", "--rounds", 1, "--cores", 1))
    assert (found["images"], found["megapixels"], found["rounds"]) == (2, 0.13, 1)
    # On one core of several the ratios say so.
    (ending,) = {
        name.removeprefix("predict_vs_stardist_grid_2") for name in found if "predict_vs_stardist_grid_2" in name
    }
    rates = found[f"megapixels_per_s{ending}"]
    for name in ("stardist", "stardist_grid_2"):
        for part in ("predict", "network_and_decode"):
            ratio = rates[part]["nuciseg"] / rates[part][name]
            assert found[f"{part}_vs_{name}{ending}"] == pytest.approx(ratio, rel=0.02)
    # Random weights would find none or thousands.
    num_true = sum(int(read_labels(path).max()) for path in (fields / "test" / "masks").iterdir())
    assert found["nuclei_found"]["stardist"] == pytest.approx(num_true, rel=0.2)
    assert found["stardist_candidates"]["stardist"] > num_true


def write_rows(path: Path, rows: Sequence[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_nuciseg_run(out: Path) -> None:
    """Reaches .7 in its first epoch and .85 in its second, after 2 minutes with and 1.5 without validation."""
    scores = (0.7, 0.86, 0.9)
    rows = [
        {"epoch": epoch, "train_s": 45.0, "validation_s": 15.0, "ap50_pooled": score}
        for epoch, score in enumerate(scores, 1)
    ]
    write_rows(out / "nuciseg" / "metrics.jsonl", rows)


@pytest.mark.parametrize(
    ("last", "minutes", "cut_off"), [(0.84, 6.5, True), (0.85, 6.5, False)], ids=["cut off", "reached"]
)
def test_time_to_accuracy_combines_what_was_measured(
    fields: Path, tmp_path: Path, last: float, minutes: float, cut_off: bool
) -> None:
    write_nuciseg_run(tmp_path)
    seconds = (180.0, 60 * minutes)
    rows = [
        {"epoch": 1, "train_s": seconds[0], "ap50_pooled": 0.7},
        {"epoch": 2, "train_s": seconds[1], "ap50_pooled": last},
    ]
    write_rows(tmp_path / "stardist_grid_2.jsonl", rows)
    result = result_of(run("time_to_accuracy.py", fields, "--out", tmp_path))
    assert result["nuciseg"] == {"epoch": 2, "minutes": 2.0, "minutes_without_validation": 1.5}
    assert result["stardist"] == {"epoch": 2, "minutes": minutes, "best_ap": last}
    assert (result["vs_stardist"], result["vs_stardist_without_validation"]) == (3.25, 4.333)
    assert result["cut_off"] is cut_off
    lower = result["at_lower_targets"]
    assert lower["0.70"] == {"vs_stardist": 3.0, "vs_stardist_without_validation": 4.0, "cut_off": False}
    assert lower["0.75"]["vs_stardist"] == 3.25
    assert json.loads((tmp_path / "result.json").read_text()) == result


@pytest.mark.slow
def test_time_to_accuracy_ends_at_its_target_also_in_the_background_of_a_shell(fields: Path, tmp_path: Path) -> None:
    settings = (*ONE_EPOCH, "--train.epochs", "200", "--only", "nuciseg", "--data.cache_dir", tmp_path / "cache")
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `command &` of a script has it
    try:
        result = result_of(run("time_to_accuracy.py", fields, "--out", tmp_path, *settings))
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert result["nuciseg"]["epoch"] == 1
    assert len((tmp_path / "nuciseg" / "metrics.jsonl").read_text().splitlines()) < 200


def test_time_to_accuracy_needs_a_limit_for_stardist_alone(fields: Path, tmp_path: Path) -> None:
    done = run("time_to_accuracy.py", fields, "--out", tmp_path, "--only", "stardist")
    assert done.returncode == 1
    cure = "run it first, or give --limit-minutes"
    assert done.stderr.splitlines() == [f"{tmp_path} has no time of nuciseg to cut StarDist off by; {cure}"]


@pytest.mark.slow
def test_logical_nodes_are_taken_down_after_their_run(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    words = ("--config", tmp_path / "small.yaml", "--train.epochs", 1, "--run.storage_path", tmp_path)
    done = run("logical_nodes.py", 1, *words, "--run.name", "a")
    assert done.returncode == 0, done.stderr
    assert logged_epochs(tmp_path / "a") == [1]


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)
def test_workers_get_the_cores_that_ray_does_not_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    scaling = importlib.import_module("scaling")
    *shared, spare = sorted(os.sched_getaffinity(0))
    starts = f"import subprocess; subprocess.run([{scaling.WORKER!r}, '-c', 'echo; read line'], executable='/bin/sh')"
    command = [sys.executable, "-c", starts]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ray:
        assert ray.stdout is not None
        ray.stdout.readline()  # the worker is there
        worker, *others = psutil.Process(ray.pid).children()
        scaling.place(ray.pid, (shared, [spare]))
        found = sorted(os.sched_getaffinity(worker.pid)), os.sched_getaffinity(ray.pid)
        ray.communicate("\n")
    assert not others
    assert found == (shared, {spare})


@pytest.mark.parametrize("script", ["inference.py", "time_to_accuracy.py"])
def test_benchmarks_name_a_missing_folder(script: str, tmp_path: Path) -> None:
    done = run(script, tmp_path / "no", *(("--out", tmp_path / "out") if script == "time_to_accuracy.py" else ()))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"The data folder {tmp_path / 'no'} does not exist; check data.root."]


def test_benchmarks_say_what_a_python_without_stardist_lacks(fields: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    write_nuciseg_run(tmp_path)
    done = run("time_to_accuracy.py", fields, "--out", tmp_path, "--stardist-python", python)
    assert done.returncode == 1
    assert "is not installed for" in done.stderr.splitlines()[-1]
    assert "--stardist-python" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
