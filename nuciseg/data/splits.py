"""Divide records into train and validation: by seed, by group, and with a hash that names the division."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from nuciseg.data.formats.folders import listed
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
    sizes = _group_sizes(records)
    if len(sizes) < 2:
        raise DataError(
            f"{len(records)} images in {len(sizes)} group(s) cannot be divided into train and validation; "
            "at least two images from different fields are needed."
        )
    return _split(records, _choose_groups(sizes, validation_fraction, seed), seed)


def fold_records(records: Sequence[Record], num_folds: int, fold: int, seed: int) -> Split:
    """One part of a cross-validation: of `num_folds` parts of whole groups, part `fold` (0, 1, ...) is validation.

    Every image is in exactly one part. Groups go, in an order drawn from `seed`, to the part that is smallest so far,
    so that parts differ by at most the largest group. Raises `ConfigError` for a fold that does not exist, `DataError`
    for fewer groups than parts or for an id that occurs twice.
    """
    if not 0 <= fold < num_folds:
        raise ConfigError(f"data.fold is {fold}, but data.num_folds is {num_folds}; choose 0 to {num_folds - 1}.")
    sizes = _group_sizes(records)
    if len(sizes) < num_folds:
        raise DataError(
            f"{len(records)} images in {len(sizes)} group(s) cannot be divided into {num_folds} folds; set "
            "data.num_folds to fewer."
        )
    parts: list[set[str]] = [set() for _ in range(num_folds)]
    num_images = [0] * num_folds
    for name in _shuffled(sizes, seed):
        smallest = num_images.index(min(num_images))
        parts[smallest].add(name)
        num_images[smallest] += sizes[name]
    return _split(records, parts[fold], seed)


def listed_records(records: Sequence[Record], path: Path, seed: int) -> Split:
    """Validation is what the text file `path` names, one id a line; all other images are for training.

    Nothing is drawn, `seed` is only written down. Raises `DataError` for a file that cannot be read, names no image,
    one that does not exist, or all; for one that divides a group; and for an id that occurs twice in `records`.
    """
    _group_sizes(records)
    chosen = _read_ids(path)
    ids = {record.id for record in records}
    if unknown := chosen - ids:
        raise DataError(
            f"{path} names {len(unknown)} of {len(chosen)} images that there are not: {listed(unknown)}; take the ids "
            f"of training images, which are {listed(ids)}."
        )
    if chosen == ids:
        raise DataError(f"{path} names all {len(ids)} images, so none is left to train on; take some out of the list.")
    held_out = {record.group for record in records if record.id in chosen}
    torn = {record.group for record in records if record.id not in chosen} & held_out
    if torn:
        there, missing = (
            listed(record.id for record in records if record.group in torn and (record.id in chosen) is side)
            for side in (True, False)
        )
        raise DataError(
            f"{path} names {there} but not {missing} of the same {len(torn)} group(s), so validation would see fields "
            "that were trained on; name all images of a group or none."
        )
    return _split(records, held_out, seed)


def _read_ids(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise DataError(f"{path} cannot be read ({reason}); check data.validation_list.") from error
    if ids := {line.strip() for line in lines} - {""}:
        return ids
    raise DataError(f"{path} names no image; write the id of one validation image a line, or unset the list.")


def held_out_by_stardist(ids: Sequence[str]) -> tuple[str, ...]:
    """The ids that StarDist's example notebooks hold out, sorted: of `ids` in the order of the alphabet the last 15 %
    (rounded) of a permutation by numpy's RandomState with seed 42; 67 of the 447 of its dsb2018.
    """
    ordered = sorted(ids)
    num_held_out = max(1, round(0.15 * len(ordered)))
    chosen = np.random.RandomState(42).permutation(len(ordered))[-num_held_out:]
    return tuple(sorted(ordered[index] for index in chosen))


def _group_sizes(records: Sequence[Record]) -> dict[str, int]:
    ids: set[str] = set()
    sizes: dict[str, int] = {}
    for record in records:
        if record.id in ids:
            raise DataError(f"The id '{record.id}' occurs twice in the data set; give each image its own name.")
        ids.add(record.id)
        sizes[record.group] = sizes.get(record.group, 0) + 1
    return sizes


def _split(records: Sequence[Record], held_out: set[str], seed: int) -> Split:
    """The division by groups that are held out."""
    by_id = sorted(range(len(records)), key=lambda position: records[position].id)
    validation = tuple(position for position in by_id if records[position].group in held_out)
    train = tuple(position for position in by_id if records[position].group not in held_out)
    return Split(
        train=train,
        validation=validation,
        train_ids=tuple(records[position].id for position in train),
        validation_ids=tuple(records[position].id for position in validation),
        seed=seed,
    )


def _shuffled(sizes: dict[str, int], seed: int) -> list[str]:
    names = sorted(sizes)
    return [names[i] for i in np.random.default_rng(seed).permutation(len(names))]


def _choose_groups(sizes: dict[str, int], fraction: float, seed: int) -> set[str]:
    num_images = sum(sizes.values())
    wish = min(max(round(fraction * num_images), 1), num_images - 1)
    names = _shuffled(sizes, seed)
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
