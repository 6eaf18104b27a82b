"""Runs and searches of seconds on a played cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from small_runs import QUICK_TO_LEARN

from nuciseg.config import Config, load_config, merged

# 48 images in batches of 12: 4 steps an epoch, at a rate that lets rounding stay rounding.
RUN = {
    "data": {"batch_size": 12},
    "optim": {"lr": 0.02},
    "train": {"epochs": 5, "calibrate": False},
    "scale": {"num_workers": 2, "cpus_per_worker": 1},
    "tracking": {"kind": "offline"},
}
STEPS = 4


def write_settings(folder: Path, name: str, **more: Any) -> Config:
    """`NAME.yaml` of a run or search whose folder is `runs/NAME`."""
    here = {"run": {"storage_path": str(folder / "runs"), "name": name}}
    settings = merged(merged(merged(QUICK_TO_LEARN, RUN), here), more)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return load_config(folder / f"{name}.yaml")
