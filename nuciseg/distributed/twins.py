"""Trials that another search of the same `tune` has trained already.

The questions of a study have an arm in common, what they all start from. Training is exact: the same configuration on
the same images gives the same weights, so such a trial is trained once, and the other searches take it over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nuciseg.config import Config, load_config, write_config
from nuciseg.distributed.trials import searches_in
from nuciseg.distributed.worker import CONFIG_FILE, FINISHED_FILE, IMAGES_FILE, SPLIT_FILE, Job
from nuciseg.engine.checkpoint import CheckpointStore, write_json
from nuciseg.errors import writing
from nuciseg.tracking import IDENTITY_FILE, METRICS_FILE

TWIN_FILE = "taken_over.json"
_OF_NO_RESULT = ("run", "tracking", "search")
_KEPT = (SPLIT_FILE, METRICS_FILE, IMAGES_FILE, IDENTITY_FILE, FINISHED_FILE)  # the last one makes a run finished


def take_over_twin(job: Job, search_dir: Path) -> None:
    """Where a search beside `search_dir` has finished a trial of the same configuration, copy it as `job`'s own.

    Its W&B run stays the only one. A job that was begun already is left alone. Raises ResourceError.
    """
    own = CheckpointStore(job.run_dir)
    if own.last is not None:
        return
    for run_dir in _finished_beside(search_dir):
        if _of_result(load_config(run_dir / CONFIG_FILE)) != _of_result(job.config):
            continue
        write_json({"trained_in": os.path.relpath(run_dir, job.run_dir)}, job.run_dir / TWIN_FILE)
        own.take_over(CheckpointStore(run_dir))
        write_config(job.config, job.run_dir / CONFIG_FILE)
        with writing(job.run_dir):
            for name in _KEPT:
                if (run_dir / name).exists():
                    shutil.copy(run_dir / name, job.run_dir / name)
        return


def _finished_beside(search_dir: Path) -> Iterator[Path]:
    searches = searches_in(search_dir.parent)
    if search_dir not in searches:
        return  # a search by itself
    for other in searches:
        if other != search_dir:
            yield from (path.parent for path in sorted(other.glob(f"*/{FINISHED_FILE}")))


def _of_result(config: Config) -> dict[str, Any]:
    """The settings that a run's result depends on."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in _OF_NO_RESULT}
