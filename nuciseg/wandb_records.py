"""The `.wandb` files in a run's folder: which there are, and which epochs reached them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from nuciseg.patience import names_in, patiently

OVERLAY_PREFIX = "overlays/"


def wandb_files(folder: Path) -> list[Path]:
    """The `.wandb` files under `folder/wandb`, oldest first."""
    legs = [folder / "wandb" / name for name in names_in(folder / "wandb") if "run-" in name]
    legs.sort(key=lambda leg: leg.name.split("run-", 1)[1])
    return [leg / name for leg in legs for name in names_in(leg) if name.startswith("run-") and name.endswith(".wandb")]


def logged_epochs(paths: Sequence[Path]) -> tuple[set[int], set[int], int]:
    """Epochs with metrics, epochs with overlays, and the next free W&B step in `.wandb` files.

    The files are asked, rather than a note beside them, because after a kill only they know what reached the disk.
    """
    from wandb.proto import wandb_internal_pb2

    metric_epochs: set[int] = set()
    overlay_epochs: set[int] = set()
    next_step = 0
    for path in paths:
        for data in _log_records(patiently(path.read_bytes)):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if not record.HasField("history"):
                continue
            next_step = max(next_step, record.history.step.num + 1)
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            if "epoch" in items:
                has_overlays = any(key.startswith(OVERLAY_PREFIX) for key in items)
                (overlay_epochs if has_overlays else metric_epochs).add(int(items["epoch"]))
    return metric_epochs, overlay_epochs, next_step


def _log_records(data: bytes) -> Iterator[bytes]:
    """Whole records of a LevelDB log (github.com/google/leveldb, doc/log_format.md) after wandb's 7 byte header.

    Blocks of 32 KiB hold chunks of crc32 (4 bytes), length (2), type (1: whole, 2 3 4: first, middle, last). Stops at
    the first chunk that a killed writer left incomplete.
    """
    position, record = 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + 7 : position + 7 + length]
        if kind == 0 or len(chunk) < length or zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != crc:
            return
        position += 7 + length
        record = chunk if kind in (1, 2) else record + chunk
        if kind in (1, 4):
            yield record
