"""Divide records into train and validation: by seed, by group, and with a hash that names the division."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from nuciseg.errors import ConfigError, DataError
from nuciseg.images import write_bytes
from nuciseg.types import Record


@dataclass(frozen=True)
class Split:
    """`train` and `validation` are positions in the records that were given, each in ascending order of id."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    train_ids: tuple[str, ...]
    validation_ids: tuple[str, ...]
    seed: int

    @property
    def hash(self) -> str:
        """16 hex digits of BLAKE2b over the sorted ids of either side: equal for equal sides, whatever the seed."""
        sides = [sorted(self.train_ids), sorted(self.validation_ids)]
        return blake2b(json.dumps(sides).encode(), digest_size=8).hexdigest()

    def write(self, path: Path) -> None:
        """Write hash, seed and ids as JSON. Raises `ResourceError` where that is not possible."""
        content = {
            "hash": self.hash,
            "seed": self.seed,
            "train": list(self.train_ids),
            "validation": list(self.validation_ids),
        }
        write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def split_records(records: Sequence[Record], validation_fraction: float, seed: int) -> Split:
    """Put whole groups aside for validation until they hold `validation_fraction` of the images.

    Groups are tried in an order drawn from `seed`, and one is taken if that brings the number of validation images
    nearer to the wish. The number so misses the wish by at most half a group, not at all when each image is its own
    group. The result depends on the set of records, not on their order. Either side gets at least one group.
    Raises `DataError` for fewer than two groups or for an id that occurs twice.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction is {validation_fraction}; choose a share between 0 and 1, as 0.15.")
    members: dict[str, list[str]] = {}
    positions: dict[str, int] = {}
    for position in sorted(range(len(records)), key=lambda i: records[i].id):
        record = records[position]
        if record.id in positions:
            raise DataError(f"The id '{record.id}' occurs twice in the data set; give each image its own name.")
        positions[record.id] = position
        members.setdefault(record.group, []).append(record.id)
    if len(members) < 2:
        raise DataError(
            f"{len(records)} images in {len(members)} group(s) cannot be divided into train and validation; "
            "at least two images from different fields are needed."
        )
    chosen = _choose_groups({group: len(ids) for group, ids in members.items()}, validation_fraction, seed)
    validation_ids = tuple(sorted(id for group in chosen for id in members[group]))
    held_out = set(validation_ids)
    train_ids = tuple(id for id in positions if id not in held_out)
    return Split(
        train=tuple(positions[id] for id in train_ids),
        validation=tuple(positions[id] for id in validation_ids),
        train_ids=train_ids,
        validation_ids=validation_ids,
        seed=seed,
    )


def _choose_groups(sizes: dict[str, int], fraction: float, seed: int) -> set[str]:
    num_images = sum(sizes.values())
    wish = min(max(round(fraction * num_images), 1), num_images - 1)
    names = sorted(sizes)
    names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    chosen: set[str] = set()
    num_chosen = 0
    for name in names:
        if abs(num_chosen + sizes[name] - wish) < abs(num_chosen - wish):
            chosen.add(name)
            num_chosen += sizes[name]
    smallest = min(names, key=lambda name: sizes[name])
    if not chosen:  # every group is more than twice the wish
        return {smallest}
    if len(chosen) == len(names):  # the wish is nearly everything, yet train needs a group
        return chosen - {smallest}
    return chosen
