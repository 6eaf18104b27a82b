"""Read the offline files of W&B runs back, in order of start, as W&B's own server would see them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER_BYTES = 7
BLOCK_BYTES = 32768


@dataclass
class OfflineRun:
    """One `.wandb` file."""

    path: Path
    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    step_metrics: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def epochs(self) -> list[int]:
        """Epochs of the rows that hold metrics rather than pictures or tables, in the order written."""
        return [row["epoch"] for row in self.history if "epoch" in row and not any(map(is_media, row.values()))]

    def pictures(self) -> dict[tuple[int, str], Path]:
        """Files of the logged pictures by (epoch, key)."""
        files = self.path.parent / "files"
        return {
            (row["epoch"], key): files / value["path"]
            for row in self.history
            for key, value in row.items()
            if is_media(value) and value["_type"] == "image-file"
        }


def read_offline_runs(folder: Path) -> list[OfflineRun]:
    """All offline runs under `folder/wandb`, oldest first."""
    return [_read(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def assert_one_wandb_run(run_dir: Path) -> None:
    """However often it was killed: one W&B run, in which each epoch of `metrics.jsonl` stands once."""
    legs = read_offline_runs(run_dir)
    # W&B had written nothing yet in the file of a process that was killed at once, so nothing is missing there.
    assert len({leg.run["id"] for leg in legs if leg.run or leg.history}) == 1
    epochs = sorted(epoch for leg in legs for epoch in leg.epochs)
    assert epochs == [row["epoch"] for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())]


def _read(path: Path) -> OfflineRun:
    result = OfflineRun(path)
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            result.run = {
                "id": run.run_id,
                "name": run.display_name,
                "project": run.project,
                "group": run.run_group,
                "job_type": run.job_type,
                "tags": list(run.tags),
            }
            result.config.update(_items(run.config.update))
        elif kind == "config":
            result.config.update(_items(record.config.update))
        elif kind == "history":
            result.history.append(_items(record.history.item))
        elif kind == "summary":
            result.summary.update(_items(record.summary.update))
        elif kind == "metric":
            result.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            artifact = record.artifact
            result.artifacts.append(
                {
                    "name": artifact.name,
                    "type": artifact.type,
                    "aliases": list(artifact.aliases),
                    "files": {entry.path: entry.local_path for entry in artifact.manifest.contents},
                }
            )
        elif kind == "exit":
            result.exit_code = record.exit.exit_code
    return result


def is_media(value: Any) -> bool:
    return isinstance(value, dict) and "_type" in value


def _items(items: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in items:
        *parents, name = list(item.nested_key) or [item.key]
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = json.loads(item.value_json)
    return result


def _records(data: bytes) -> Iterator[bytes]:
    magic, number, _version = struct.unpack_from("<4sHB", data)
    assert (magic, number) == (b":W&B", 0xBEE1), "not a .wandb file"
    position, record = HEADER_BYTES, b""
    while position + 7 <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < 7:
            position += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + 7 : position + 7 + length]
        if kind == 0 or len(chunk) < length:
            return
        assert zlib.crc32(chunk, zlib.crc32(bytes([kind]))) == crc, f"bad checksum at byte {position}"
        position += 7 + length
        record = chunk if kind in (1, 2) else record + chunk
        if kind in (1, 4):
            yield record
