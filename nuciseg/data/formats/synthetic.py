"""Drawn clusters in the `nucleus` format, without a folder: the records come from a configuration.

Unlike the other formats `read` and `load` take a `SyntheticConfig` where those take a root folder; nothing is
detected, since there is nothing on disk.
"""

from __future__ import annotations

from hashlib import blake2b

from nuciseg.data.synthetic import SPLITS, SplitName, SyntheticConfig, cluster_seed, draw_cluster, num_samples
from nuciseg.errors import DataError
from nuciseg.types import Record, Sample

NAME = "synthetic"
LAYOUT = "no folder: clusters are drawn"

# Raise this when `draw_cluster` draws other pictures from the same configuration: it renews the caches.
DRAWING_VERSION = 1


def read(config: SyntheticConfig, split: str) -> list[Record]:
    """One record per cluster of `split` ("train" or "test"); each cluster is a group of its own.

    An id names what is drawn (a hash of all that decides it, the split and the number), so that a cache can be keyed
    by ids. Raises `DataError` for another split.
    """
    name = _split_name(split)
    stem = f"{_drawing_hash(config)}-{name}"
    ids = [f"{stem}-{index:05d}" for index in range(num_samples(config, name))]
    return [Record(id=id, image_path=None, label_paths=(), group=id) for id in ids]


def load(record: Record, config: SyntheticConfig) -> Sample:
    """Draw the cluster of `record`, which must come from `read` with the same configuration."""
    drawing, split, index = record.id.split("-")
    assert drawing == _drawing_hash(config), f"{record.id} was drawn with another configuration"
    return draw_cluster(config, cluster_seed(config, _split_name(split), int(index)))


def _split_name(split: str) -> SplitName:
    for name in SPLITS:
        if split == name:
            return name
    raise DataError(f"Drawn data has no split '{split}'; choose one of {', '.join(SPLITS)}.")


def _drawing_hash(config: SyntheticConfig) -> str:
    """8 hex digits of what decides a picture; how many are drawn does not."""
    described = f"{DRAWING_VERSION} {config.model_dump_json(exclude={'num_train', 'num_test'})}"
    return blake2b(described.encode(), digest_size=4).hexdigest()
