"""Each benchmark runs and ends with its ratios. Sizes are tiny: no figure here means anything."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = "--crop-px 32 --batch-size 2 --steps 1 --rounds 1 --threads 1 --precision fp32"


needs_bench = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lightning", "segmentation_models_pytorch")),
    reason="needs pip install -e '.[bench]'",
)


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
