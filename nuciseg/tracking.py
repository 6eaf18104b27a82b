"""Where a run's figures go: always `metrics.jsonl` in the run's folder, and one Weights & Biases run beside it.

The axis is the epoch. An epoch is logged once, however often a run is killed and resumed: what the earlier legs wrote
is read back from the run's own files, and epochs that only the checkpoint remembers are added.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nuciseg.errors import ConfigError, DataError, ResourceError, writing
from nuciseg.patience import is_away, patiently
from nuciseg.section import Section
from nuciseg.tracking_wandb import Mode, RunIdentity, WandbRun, configured_mode, open_run

__all__ = [
    "RunIdentity",
    "Tracker",
    "TrackingConfig",
    "describe_run",
    "open_tracker",
    "read_identity",
    "read_metrics",
    "sync_command",
]

METRICS_FILE = "metrics.jsonl"
IDENTITY_FILE = "tracking.json"


class TrackingConfig(Section):
    """Where the figures of a run are logged. The W&B key never stands here: W&B finds it itself."""

    kind: Literal["auto", "wandb", "offline", "none"] = Field(
        "auto",
        description="auto: W&B online where a key is configured (`wandb login` or WANDB_API_KEY), else W&B offline in "
        "the run's folder; wandb: online, a missing key is an error; none: no W&B, metrics.jsonl alone",
    )
    project: str = Field("nuciseg", min_length=1, max_length=128, description="W&B project: the study")
    entity: str | None = Field(None, description="W&B user or team; none: the key's own")
    tags: tuple[str, ...] = Field((), description="W&B tags, added to those of the run; cut after 64 characters")
    num_overlays: int = Field(16, ge=0, le=16, description="validation pictures logged, the same ones each time")


class Tracker:
    """`metrics.jsonl` for the epochs and, unless `wandb_run` is None, everything to W&B.

    Called from rank 0 only. `log_epoch` and `log_overlays` wait for no network; the calls at a run's end wait a minute
    for a server that was lost.
    """

    def __init__(self, run_dir: Path, identity: RunIdentity, wandb_run: WandbRun | None) -> None:
        self._path = run_dir / METRICS_FILE
        self._identity = identity
        self._wandb_run = wandb_run
        self._epochs = {int(row["epoch"]) for row in read_metrics(self._path)}

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """The figures of one epoch. An epoch that the run has already is left as it is. Raises ResourceError."""
        if epoch not in self._epochs:
            self._epochs.add(epoch)
            row = {"epoch": epoch, **{key: _finite(value) for key, value in metrics.items() if key != "epoch"}}
            with writing(self._path):
                _append(row, self._path)
        if self._wandb_run is not None:
            self._wandb_run.log_epoch(epoch, metrics)

    @property
    def shows_pictures(self) -> bool:
        """Whether drawing any is worth the while."""
        return self._wandb_run is not None

    def log_overlays(self, epoch: int, overlays: Mapping[str, NDArray[np.uint8]]) -> None:
        """Pictures by image id, each rgb_HWC uint8."""
        if self._wandb_run is not None and overlays:
            self._wandb_run.log_overlays(epoch, overlays)

    def log_image_scores(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The table of per-image scores: rows with the same keys."""
        if self._wandb_run is not None and rows:
            self._wandb_run.log_table("image_scores", rows)

    def log_checkpoint(self, folder: Path, aliases: Sequence[str] = ("best", "latest")) -> None:
        """The files of a checkpoint folder, which must stay until they are uploaded."""
        if self._wandb_run is not None:
            self._wandb_run.log_checkpoint(f"model-{self._identity.id}", folder, aliases)

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Figures about the whole run."""
        if self._wandb_run is not None:
            self._wandb_run.log_summary(values)

    def finish(self, exit_code: int) -> None:
        """End the run; 0 is success."""
        if self._wandb_run is not None:
            self._wandb_run.finish(exit_code)


def open_tracker(
    config: TrackingConfig,
    identity: RunIdentity,
    run_dir: Path,
    resolved_config: Mapping[str, Any],
    *,
    history: Sequence[Mapping[str, float]] = (),
    verbose: bool = False,
) -> Tracker:
    """Start the logging of a run, or go on with it where `run_dir` holds an earlier leg of the same run.

    `history` are the epochs that the checkpoint remembers, each with its `epoch`: those that a killed leg did not log
    are logged now, and so are those that stand in `metrics.jsonl` but did not reach W&B.
    Raises ConfigError where W&B is demanded without a key or the folder belongs to another run, DataError for a
    damaged `metrics.jsonl`, ResourceError where the folder cannot be written.
    """
    earlier = read_identity(run_dir)
    if earlier is not None and earlier.id != identity.id:
        raise ConfigError(f"{run_dir} holds the run {earlier.id!r}, not {identity.id!r}: give each run its own folder")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(run_dir / METRICS_FILE)
        mode = wandb_mode(config, verbose)
        wandb_run = (
            None
            if mode is None
            else open_run(mode, config.project, config.entity, config.tags, identity, run_dir, resolved_config, verbose)
        )
        _write_identity(run_dir, identity, wandb_run.url if wandb_run else None)
        tracker = Tracker(run_dir, identity, wandb_run)
        rows = {int(row["epoch"]): row for row in (*read_metrics(run_dir / METRICS_FILE), *history)}
        for epoch in sorted(rows):
            tracker.log_epoch(epoch, rows[epoch])
    except OSError as error:
        raise ResourceError(f"cannot log into {run_dir} ({error.strerror}): choose another folder") from error
    return tracker


def wandb_mode(config: TrackingConfig, verbose: bool) -> Mode | None:
    if config.kind == "none":
        return None
    if config.kind == "offline":
        return "offline"
    configured = configured_mode(verbose)
    if config.kind == "wandb" and configured != "online":
        raise ConfigError(
            "tracking.kind is 'wandb' but W&B is offline or has no key here: run `wandb login`, set WANDB_API_KEY, or "
            "choose 'auto' or 'offline'"
        )
    return None if configured == "disabled" else configured


# --- files -----------------------------------------------------------------------------------------------------------


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The epochs in a `metrics.jsonl`, in the order written; a last line that a kill cut short is left out.

    Raises DataError for any other line that is no JSON object with an `epoch`.
    """
    text = patiently(lambda: path.read_text(encoding="utf-8", errors="replace") if path.exists() else "")
    *lines, _torn = text.split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or "epoch" not in row:
            raise DataError(f"line {number} of {path} is no epoch: remove the line or restore the file")
        rows.append(row)
    return rows


def read_identity(run_dir: Path) -> RunIdentity | None:
    """The run that logs into this folder, None for a new one. Raises DataError for a damaged file."""
    saved = _saved(run_dir)
    if saved is None:
        return None
    return RunIdentity(saved["id"], saved["name"], saved["group"], saved["job_type"], tuple(saved["tags"]))


def describe_run(run_dir: Path) -> str:
    """One line for the end of a run, or of a search with one folder a trial: where its curves are to be seen."""
    saved = _saved(run_dir)
    if saved is None:
        places = [f"W&B runs: {found}" for found in sorted(_online_groups(run_dir))]
        metrics = run_dir / "*" / METRICS_FILE
    else:
        places = [f"W&B run: {saved['url']}"] if saved["url"] else []
        metrics = run_dir / METRICS_FILE
    command = sync_command(run_dir)
    if command:
        places.append(f"W&B offline run, to upload it: {command}")
    return "; ".join(places) or f"metrics: {metrics}"


def _online_groups(search_dir: Path) -> set[str]:
    """Project page and group of every trial that W&B has; the address of a group's own page is W&B's to change."""
    trials = [_saved(path.parent) for path in search_dir.glob(f"*/{IDENTITY_FILE}")]
    return {
        f"{trial['url'].rpartition('/runs/')[0]} (group {trial['group']})" for trial in trials if trial and trial["url"]
    }


def sync_command(folder: Path) -> str | None:
    """The command that uploads the offline runs in `folder` (a run's, or a search's with one folder a trial).

    With what online legs of theirs had not sent. None where nothing was logged offline.
    """
    quoted = shlex.quote(str(folder))
    for place in ("wandb", "*/wandb"):
        found = sorted(folder.glob(f"{place}/offline-run-*"))
        if any(any(path.parent.glob("run-*")) for path in found):
            return f"wandb sync --include-online {quoted}/{place}/*run-*-*"
        if len(found) == 1:
            return f"wandb sync {shlex.quote(str(found[0]))}"
        if found:
            return f"wandb sync {quoted}/{place}/offline-run-*"
    return None


def _saved(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / IDENTITY_FILE
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is damaged ({error}): restore it or remove it") from error
    if not isinstance(saved, dict) or not {"id", "name", "group", "job_type", "tags", "url"} <= set(saved):
        raise DataError(f"{path} does not describe a run: restore it or remove it")
    return saved


def _write_identity(run_dir: Path, identity: RunIdentity, url: str | None) -> None:
    saved = {
        "id": identity.id,
        "name": identity.name,
        "group": identity.group,
        "job_type": identity.job_type,
        "tags": list(identity.tags),
        "url": url,
    }
    temporary = run_dir / f"{IDENTITY_FILE}.tmp"
    temporary.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, run_dir / IDENTITY_FILE)


def _append(row: Mapping[str, Any], path: Path) -> None:
    line = json.dumps(row, allow_nan=False) + "\n"

    def append() -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)

    def append_if_missing() -> None:
        _drop_torn_line(path)
        if row["epoch"] not in [written["epoch"] for written in read_metrics(path)]:
            append()

    try:
        append()
    except OSError as error:
        if not is_away(error):
            raise
        patiently(append_if_missing)  # storage that went away may have taken the line, or a part of it


def _drop_torn_line(path: Path) -> None:
    """Cut what a killed writer left after the last line end, so that the next line starts clean."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
