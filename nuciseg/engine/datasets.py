"""From a configuration to images that are decoded, cached and split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from nuciseg.config import Config, DataConfig
from nuciseg.data.augment import Augmenter
from nuciseg.data.cache import CachedSamples, open_cache
from nuciseg.data.dataset import SampleStore, TrainingData, repeated_by_area
from nuciseg.data.fetching import local_folder
from nuciseg.data.formats import CLUSTER_FORMATS, detect_format, get_format, synthetic
from nuciseg.data.formats.folders import with_fields_joined
from nuciseg.data.splits import Split, fold_records, held_out_by_stardist, listed_records, split_records
from nuciseg.engine.checkpoint import find_checkpoint, load_checkpoint
from nuciseg.engine.network import stride_of
from nuciseg.errors import ConfigError, DataError
from nuciseg.labels import median_diameter
from nuciseg.targets import build_target
from nuciseg.types import Diameters, Record, Sample

MEASURED_IMAGES = 300


@dataclass(frozen=True)
class TrainingSet:
    """All training images of a data set, and which of them are held out for validation."""

    samples: CachedSamples
    split: Split
    training_data: TrainingData

    @property
    def in_channels(self) -> int:
        return int(self.samples[0].image_HWC.shape[2])

    def diameters(self) -> Diameters | None:
        """The sizes of the training nuclei, from up to 300 images; None where they have none."""
        step = max(1, len(self.split.train) // MEASURED_IMAGES)
        medians = [median_diameter(self.samples[index].labels_HW) for index in self.split.train[::step]]
        known = [median for median in medians if median is not None]
        return Diameters(*(float(value) for value in np.percentile(known, (5, 50, 95)))) if known else None


def open_samples(config: DataConfig, split: str) -> CachedSamples:
    """The decoded images of `split` ("train" or "test").

    They are decoded once per node: the cache is shared by its workers and by all runs. Raises DataError.
    """
    return _open(config, split)[1]


def check_first_image(config: DataConfig) -> list[Record]:
    """The records of the training images, of which the first was decoded. Raises DataError, ResourceError."""
    _, records, load = _read(config, "train")
    if not records:
        raise DataError("There are no images to open; check data.root and the split.")
    load(records[0])
    return records


def open_split_samples(config: DataConfig) -> tuple[CachedSamples, Split]:
    """The decoded training images, and which of them are held out for validation. Raises DataError."""
    records, samples = _open(config, "train")
    return samples, divide(records, config)


def divide(records: Sequence[Record], config: DataConfig) -> Split:
    """The records' division into training and validation that `config` describes. Raises ConfigError or DataError."""
    if config.validation_list is not None:
        return listed_records(records, config.validation_list, config.split_seed)
    if config.num_folds is not None:
        return fold_records(records, config.num_folds, config.fold, config.split_seed)
    return split_records(records, config.validation_fraction, config.split_seed)


def open_training_set(config: Config, stride: int) -> TrainingSet:
    """Training and validation images, for a network of `stride` pixels. Raises ConfigError or DataError."""
    check_augmentation(config)
    samples, split = open_split_samples(config.data)
    refuse_smaller_than(stride, samples)
    training_data = TrainingData(
        samples=samples,
        indices=repeated_by_area(split.train, samples.shapes, config.data.crop_px)
        if config.data.crops == "by_area"
        else split.train,
        normalization=config.data.normalization,
        augmenter=Augmenter(config.augment),
        target=build_target(config.target),
        crop_px=config.data.crop_px,
        seed=config.seed,
        multiple=max(stride, 32),
        least_canvas_px=2 * stride,  # one image whose deepest map is one pixel has no variance to normalise with
        marking=config.data.marking,
    )
    return TrainingSet(samples, split, training_data)


def check_data(config: Config) -> Split:
    """Decode all training images into the cache; raises ConfigError or DataError before anything else is begun."""
    return open_training_set(config, stride_of(config)).split


def check_beginning(config: Config) -> None:
    """Raise ConfigError where `train.init_from` names weights that were taught with images that are held out here.

    Which images those were is known where the split that the weights were trained on can be made again of these ones.
    """
    if config.train.init_from is None:
        return
    start = load_checkpoint(find_checkpoint(config.train.init_from))
    then = start.config.data.model_copy(
        update={key: getattr(config.data, key) for key in ("root", "format", "synthetic", "cache_dir")}
    )
    split = _divided_as(start.split_hash, then)
    if split is None:
        return
    taught = f"train.init_from {config.train.init_from}: its weights were trained on"
    if then.pool_test and not config.data.pool_test:
        raise ConfigError(f"{taught} the test images too, so they would be no test; set data.pool_test here as well")
    held_out = divide(_read(config.data, "train")[1], config.data).validation_ids
    seen = set(split.train_ids).intersection(held_out)
    if seen:
        keys = ("validation_fraction", "split_seed", "num_folds", "fold", "validation_list")
        flags = [
            f"--data.{key} {getattr(then, key)}" for key in keys if getattr(then, key) != getattr(config.data, key)
        ]
        raise ConfigError(
            f"{taught} {len(seen)} of the {len(held_out)} images held out here, so their scores would be no "
            f"validation; divide the images as they were then: {' '.join(flags)}"
        )


def _divided_as(split_hash: str, config: DataConfig) -> Split | None:
    """The division of the images of `config` that has this hash, where its settings or StarDist's rule give it."""
    with contextlib.suppress(ConfigError, DataError):  # the list is gone, or these are others
        records = _read(config, "train")[1]
        ids = {record.id for record in records}
        held_out = set(held_out_by_stardist(sorted(ids)))
        by_rule = Split((), (), tuple(ids - held_out), tuple(held_out), config.split_seed)
        if by_rule.hash == split_hash:
            return by_rule
        split = divide(records, config)
        return split if split.hash == split_hash else None
    return None


def check_augmentation(config: Config) -> None:
    """Raise ConfigError where the augmentation is not one for these data."""
    layout = format_of(config.data)
    if layout in CLUSTER_FORMATS:
        if config.augment.enabled and config.augment.copies:
            raise ConfigError(
                f"augment.copies is {config.augment.copies}, but that is for whole fields; set it to 0, or lay "
                "clusters against each other with augment.join"
            )
        return
    for part, strength in config.augment.of_clusters._asdict().items():
        if strength:
            raise ConfigError(
                f"augment.{part} is {strength}, but that is for clusters cut out on black; set it to 0 for data in the "
                f"{layout!r} layout"
            )
    if config.data.marking != "as_is":
        raise ConfigError(
            f"data.marking is {config.data.marking!r}, but only clusters cut out on black have a border drawn on them; "
            f"set it to 'as_is' for data in the {layout!r} layout"
        )


def refuse_smaller_than(stride: int, samples: SampleStore) -> None:
    """Raise DataError for the first image with a side shorter than the network's stride."""
    for id, (height, width, *_) in zip(samples.ids, samples.shapes, strict=True):
        if min(height, width) < stride:
            raise DataError(
                f"image {id!r} has {height}x{width} pixels, the network needs at least {stride} on each side (its "
                "stride); leave the image out, enlarge it, or use fewer stages (model.depth or model.stages)"
            )


def format_of(config: DataConfig) -> str:
    """The name of the data's layout; `synthetic` where there is no folder."""
    if config.format == "synthetic" or (config.root is None and config.format == "auto"):
        return "synthetic"
    if config.root is None:
        raise DataError(f"data.format is {config.format!r} but data.root is not set; give the folder with --data.root")
    if config.format != "auto":
        return get_format(config.format).NAME
    return detect_format(local_folder(config.root, config.cache_dir)).NAME


def _open(config: DataConfig, split: str) -> tuple[list[Record], CachedSamples]:
    name, records, load = _read(config, split)
    return records, open_cache(records, load, format_name=name, cache_dir=config.cache_dir)


def _read(config: DataConfig, split: str) -> tuple[str, list[Record], Callable[[Record], Sample]]:
    """The layout's name, the records of `split`, and what decodes one."""
    name = format_of(config)
    if config.pool_test and split == "test":
        raise DataError(
            "data.pool_test made the test images training and validation images, so there is nothing to test on; take "
            "--split validation"
        )
    parts = ("train", "test") if config.pool_test else (split,)
    if name == "synthetic":
        records = [record for part in parts for record in synthetic.read(config.synthetic, part)]
        return name, records, partial(synthetic.load, config=config.synthetic)
    assert config.root is not None  # else the format is synthetic
    layout = get_format(name)
    root = local_folder(config.root, config.cache_dir)
    records = [record for part in parts for record in layout.read(root, part)]
    return name, records if len(parts) == 1 else with_fields_joined(records), layout.load
