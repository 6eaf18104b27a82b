"""The folders of runs: a new one, one to go on with, what it will take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nuciseg.config import Config, load_config
from nuciseg.distributed.failures import forget_failure
from nuciseg.distributed.worker import CONFIG_FILE, SPLIT_FILE
from nuciseg.engine.checkpoint import disk_need_bytes
from nuciseg.engine.network import count_parameters
from nuciseg.errors import ConfigError, ResourceError
from nuciseg.tracking import RunIdentity, read_identity


def new_run_dir(config: Config, default_name: str) -> Path:
    """Make the folder of a new run. Raises ResourceError where that cannot be written, ConfigError where it exists."""
    folder = config.run.storage_path / (config.run.name or default_name)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{folder} exists already; go on with it by --resume {folder}, or choose another --run.name"
        ) from None
    except OSError as error:
        raise ResourceError(
            f"cannot write into {config.run.storage_path} ({error.strerror}); set run.storage_path to a folder you may "
            "write to"
        ) from None
    return folder


def resumed_config(folder: Path, flags: Mapping[str, Any], config_file: Path | None) -> Config:
    """The configuration of the run in `folder`, ready to go on. Raises ConfigError where there is none."""
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"--resume {folder}: no run there (it has no {CONFIG_FILE}); give the folder that was printed"
        )
    if not (folder / SPLIT_FILE).exists():
        raise ConfigError(f"--resume {folder} is a search, not a training run; resume it with `nuciseg tune`")
    refuse_other_settings(flags, config_file)
    forget_failure(folder)
    return load_config(folder / CONFIG_FILE)


def refuse_other_settings(flags: Mapping[str, Any], config_file: Path | None) -> None:
    """A resumed run keeps its settings: raise ConfigError where others are given."""
    given = next(iter(flags), None) or ("config" if config_file is not None else None)
    if given is not None:
        raise ConfigError(f"--resume goes on with the run's own settings; leave out --{given}, or start a new run")


def train_identity(config: Config, run_dir: Path) -> RunIdentity:
    """Who the run is to W&B; a resumed run is who it was."""
    earlier = read_identity(run_dir)
    if earlier is not None:
        return earlier
    kind = getattr(config.model, "encoder", config.model.kind)
    return RunIdentity(
        id=f"{run_dir.name}-{os.urandom(4).hex()}",
        name=run_dir.name,
        group=run_dir.name,
        job_type="train",
        tags=(config.model.kind, kind, config.target.kind),
    )


def describe_disk_need(config: Config) -> str:
    """One line: what the checkpoints of a run take at most, and what is free."""
    need_mb = disk_need_bytes(count_parameters(config)) / 1e6
    existing = next(
        path for path in (config.run.storage_path, *config.run.storage_path.resolve().parents) if path.exists()
    )
    free_mb = shutil.disk_usage(existing).free / 1e6
    return f"disk: at most {need_mb:.0f} MB of checkpoints a run (best, last, the next one), {free_mb:.0f} MB free"
