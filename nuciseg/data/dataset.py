"""From cached samples to batches: normalisation, canvases, the plan of an epoch, loading ahead.

Shape legend: B images in a batch, C channels, K target maps, H rows, W columns, S side of a square canvas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from nuciseg.data.augment import FREE, SATURATED, ZEROED, Augmenter, NormalizedSample
from nuciseg.data.joining import join_clusters
from nuciseg.data.markings import Marking, disturb_marking, draw_border, part_of, with_marking
from nuciseg.images import saturated_value
from nuciseg.section import Section
from nuciseg.types import Batch, Sample

CANVAS_MARGIN = 1.05  # room for a cluster that turns on its canvas
WINDOW_BATCHES = 16  # batches that are sorted by size together: larger wastes less, smaller mixes better
MIN_PIXELS = 16  # fewer pixels than this have no percentiles worth using
NORMALIZED_RANGE = (-1.0, 3.0)
CLUSTERS = 1  # tells the random numbers of joining and markings from those of the other augmentation


class NormalizationConfig(Section):
    """How raw intensities become network input: (x - low) / (high - low), limited to -1 ... 3.

    With `ignore_extremes` exact zeros become -1 and saturated pixels 3 whatever the image's contrast: the zeroed
    background of a cut-out cluster and the border drawn on it are marks, not intensities, and a network that has to
    tell them from dark and bright nuclei by a small difference seems to learn the foreground late.
    """

    low_percentile: float = Field(1.0, ge=0, lt=50, description="percentile of the image that becomes 0, per cent")
    high_percentile: float = Field(99.8, gt=50, le=100, description="percentile of the image that becomes 1, per cent")
    ignore_extremes: bool = Field(
        True, description="exact zeros (zeroed background) and saturated pixels (drawn border) are marks"
    )


class SampleStore(Protocol):
    """What training needs of a cache; `shapes` begin with height and width."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]: ...
    @property
    def ids(self) -> Sequence[str]: ...
    def __getitem__(self, index: int) -> Sample: ...


class TargetEncoder(Protocol):
    """What training needs of a target."""

    @property
    def map_names(self) -> tuple[str, ...]: ...
    def encode(self, labels_HW: NDArray[np.int32], /) -> NDArray[np.float32]: ...
    def border_of(self, labels_HW: NDArray[np.int32], /) -> NDArray[np.bool_]: ...


# ---------------------------------------------------------------------------------------------- normalisation
def normalization_bounds(image_HWC: NDArray[Any], config: NormalizationConfig) -> tuple[float, float]:
    """The raw values (low, high) that become 0 and 1; over all channels together.

    With `ignore_extremes` exact zeros and saturated pixels are left out; where fewer than 16 others remain (an
    empty or a binary image) all pixels count. An image of one value gives low + 1 as high, so it becomes 0.
    For integer images each percentile is the smallest value that at least this share of the pixels does not exceed
    (numpy's `inverted_cdf`).
    """
    percentiles = np.array([config.low_percentile, config.high_percentile])
    if image_HWC.dtype in (np.uint8, np.uint16):
        counts = _histogram(image_HWC)
        inner = counts.copy()
        if config.ignore_extremes:
            inner[[0, -1]] = 0
        if inner.sum() < MIN_PIXELS:
            inner = counts
        cumulative = np.cumsum(inner)
        ranks = np.maximum(percentiles / 100 * cumulative[-1], 1)
        low, high = (float(value) for value in np.searchsorted(cumulative, ranks - 1e-9))
    else:
        values = image_HWC.ravel()
        if config.ignore_extremes:
            inner = values[(values != 0) & (values != saturated_value(image_HWC))]
            values = inner if inner.size >= MIN_PIXELS else values
        low, high = (float(value) for value in np.percentile(values, percentiles))
    return low, (high if high > low else low + 1.0)


def _histogram(image_HWC: NDArray[Any]) -> NDArray[np.int64]:
    num_values = int(np.iinfo(image_HWC.dtype).max) + 1
    if num_values == 256:  # three times as fast as bincount
        flat = np.ascontiguousarray(image_HWC).reshape(-1, 1)
        return np.asarray(cv2.calcHist([flat], [0], None, [256], [0, 256])).ravel().astype(np.int64)
    return np.bincount(image_HWC.ravel(), minlength=num_values)


def normalize_values(values: NDArray[Any], bounds: tuple[float, float]) -> NDArray[np.float32]:
    """(values - low) / (high - low), limited to -1 ... 3, float32."""
    low, high = bounds
    scaled = values.astype(np.float32)
    scaled -= np.float32(low)
    scaled *= np.float32(1 / (high - low))
    return np.clip(scaled, *NORMALIZED_RANGE, out=scaled)


def normalize(
    image_HWC: NDArray[Any], config: NormalizationConfig, bounds: tuple[float, float] | None = None
) -> NDArray[np.float32]:
    """Network input of any integer or floating-point image: float32 in -1 ... 3, of the same shape.

    `bounds` are those of the whole image when `image_HWC` is a part of it (a tile).
    """
    bounds = bounds or normalization_bounds(image_HWC, config)
    if image_HWC.dtype == np.uint8:
        table = _normalize_with_marks(np.arange(256, dtype=np.uint8), bounds, config)
        return np.asarray(cv2.LUT(np.ascontiguousarray(image_HWC), table)).reshape(image_HWC.shape)
    return _normalize_with_marks(image_HWC, bounds, config)


def _normalize_with_marks(
    values: NDArray[Any], bounds: tuple[float, float], config: NormalizationConfig
) -> NDArray[np.float32]:
    normalized = normalize_values(values, bounds)
    if config.ignore_extremes:
        normalized[values == 0], normalized[values == saturated_value(values)] = NORMALIZED_RANGE
    return normalized


def padding_value(bounds: tuple[float, float], config: NormalizationConfig) -> float:
    """What raw 0, and so padding, is after normalisation."""
    return NORMALIZED_RANGE[0] if config.ignore_extremes else float(normalize_values(np.zeros(1), bounds)[0])


def normalized_sample(sample: Sample, config: NormalizationConfig) -> NormalizedSample:
    """The sample as the augmenter takes it, its exact zeros and saturated pixels marked when they are special."""
    image_HWC = sample.image_HWC
    bounds = normalization_bounds(image_HWC, config)
    maximum = saturated_value(image_HWC)
    zero, saturated = padding_value(bounds, config), NORMALIZED_RANGE[1]
    kind_HW = np.full(image_HWC.shape[:2], FREE, np.uint8)
    if config.ignore_extremes:
        for value, kind in ((0, ZEROED), (maximum, SATURATED)):
            equal_HWC = image_HWC == value
            kind_HW[equal_HWC[..., 0] if equal_HWC.shape[2] == 1 else equal_HWC.all(axis=2)] = kind
    return NormalizedSample(
        image_HWC=normalize(image_HWC, config, bounds),
        labels_HW=sample.labels_HW,
        kind_HW=kind_HW,
        zero_value=zero,
        saturated_value=saturated,
    )


# ------------------------------------------------------------------------------------------ the plan of an epoch
def round_up(length_px: int | float, multiple: int) -> int:
    """The smallest positive multiple of `multiple` that is not below `length_px`."""
    return max(1, int(np.ceil(length_px / multiple))) * multiple


def canvas_side(shape: Sequence[int], crop_px: int, multiple: int) -> int:
    """Side in px of the square canvas of an image: it fits with 5 % to spare, but never exceeds `crop_px`."""
    return min(round_up(crop_px, multiple), round_up(max(shape[0], shape[1]) * CANVAS_MARGIN, multiple))


def repeated_by_area(indices: Sequence[int], shapes: Sequence[Sequence[int]], crop_px: int) -> tuple[int, ...]:
    """The indices, each as often as crops fill the image's area (at least once); see `TrainingData.indices`."""
    return tuple(
        index + repetition * len(shapes)
        for index in indices
        for repetition in range(max(1, round(shapes[index][0] * shapes[index][1] / crop_px**2)))
    )


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of all workers together: sample indices and the canvas side that all of its images are padded to."""

    indices: tuple[int, ...]
    canvas_px: int

    def for_worker(self, rank: int, world_size: int) -> tuple[int, ...]:
        """The part of one worker; empty where a short last batch has fewer images than there are workers."""
        return self.indices[rank::world_size]


def epoch_batches(
    indices: Sequence[int], canvases_px: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[PlannedBatch]:
    """Global batches of one epoch: every index once, images of like canvas together, the short batch last.

    Indices are shuffled, sorted by canvas inside windows of 16 batches, and the batches shuffled again. It depends
    on the arguments alone, so that any number of workers makes the same batches. `canvases_px[i]` belongs to
    `indices[i]`.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    order = rng.permutation(len(indices))
    sides = np.asarray(canvases_px)
    batches = []
    window = batch_size * WINDOW_BATCHES
    for start in range(0, len(order), window):
        chosen = order[start : start + window]
        if chosen.size > batch_size:
            chosen = chosen[np.argsort(sides[chosen], kind="stable")]
        parts = np.split(chosen, range(batch_size, chosen.size, batch_size))
        batches += [PlannedBatch(tuple(int(indices[i]) for i in part), int(sides[part].max())) for part in parts]
    full = [batch for batch in batches if len(batch.indices) == batch_size]
    short = [batch for batch in batches if len(batch.indices) < batch_size]
    return [full[i] for i in rng.permutation(len(full))] + short


# --------------------------------------------------------------------------------------------------- training
@dataclass(frozen=True)
class LoadedBatch:
    """One worker's part of a global batch; `batch` is None where a short last batch leaves it nothing."""

    batch: Batch | None
    global_size: int


@dataclass(frozen=True)
class TrainingData:
    """Everything that turns a sample index into network input and targets.

    `indices` are those of samples; one that is a multiple of the number of samples more means the same sample once
    more, augmented in another way (`repeated_by_area`). `multiple` is the network's stride: canvases are multiples of
    it, and at least `least_canvas_px`. Samples are joined and their markings changed as the augmenter's configuration
    says.
    """

    samples: SampleStore
    indices: tuple[int, ...]
    normalization: NormalizationConfig
    augmenter: Augmenter
    target: TargetEncoder
    crop_px: int
    seed: int
    multiple: int = 32
    least_canvas_px: int = 32
    marking: Marking = "as_is"

    def canvas_px(self, index: int, epoch: int) -> int:
        """Side of the canvas of a sample; of a joined one such that both fit in whatever way they lie."""
        height, width, *_ = self.samples.shapes[self._place(index)]
        partner = self._partner(index, epoch)[0]
        more = 0 if partner is None else max(self.samples.shapes[self._place(partner)][:2])
        return max(canvas_side((height + more, width + more), self.crop_px, self.multiple), self.least_canvas_px)

    def _place(self, index: int) -> int:
        return index % len(self.samples.ids)

    def _partner(self, index: int, epoch: int) -> tuple[int | None, np.random.Generator]:
        """The sample that is joined to this one, if any, and the generator of how; from (seed, epoch, index) alone."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, index, CLUSTERS]))
        if rng.random() >= self.augmenter.config.of_clusters.join:
            return None, rng
        return self.indices[int(rng.integers(len(self.indices)))], rng

    def _sample(self, index: int, epoch: int) -> Sample:
        """The sample as a cluster that could have been photographed and marked; not yet turned and normalised."""
        changes = self.augmenter.config.of_clusters
        partner, rng = self._partner(index, epoch)
        sample = self.samples[self._place(index)]
        if partner is not None:
            sample = join_clusters(sample, self.samples[self._place(partner)], rng)
        image_HWC = disturb_marking(sample.image_HWC, changes.marking_dropped, changes.marking_shift_px, rng)
        image_HWC = with_marking(image_HWC, self.marking)
        if rng.random() < changes.drawn_borders:
            image_HWC = draw_border(image_HWC, part_of(self.target.border_of(sample.labels_HW), rng))
        return Sample(image_HWC, sample.labels_HW)

    def plan(self, epoch: int, batch_size: int) -> list[PlannedBatch]:
        """The global batches of an epoch."""
        sides = [self.canvas_px(index, epoch) for index in self.indices]
        return epoch_batches(self.indices, sides, batch_size, self.seed, epoch)

    def load(self, planned: PlannedBatch, epoch: int, rank: int = 0, world_size: int = 1) -> LoadedBatch:
        """One worker's part of a batch. A sample's augmentation depends on (seed, epoch, index) alone."""
        part = planned.for_worker(rank, world_size)
        if not part:
            return LoadedBatch(None, len(planned.indices))
        side = planned.canvas_px
        num_channels = self.samples[self._place(part[0])].image_HWC.shape[2]
        images = np.zeros((len(part), num_channels, side, side), np.float32)
        targets = np.zeros((len(part), len(self.target.map_names), side, side), np.float32)
        valid = np.zeros((len(part), side, side), np.bool_)
        for row, index in enumerate(part):
            normalized = normalized_sample(self._sample(index, epoch), self.normalization)
            own = self.canvas_px(index, epoch)
            rng_seed = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)[0]
            placed = self.augmenter(normalized, own, int(rng_seed))
            top = (side - own) // 2
            inside = slice(top, top + own)
            images[row] = normalized.zero_value
            images[row, :, inside, inside] = placed.image_SSC.transpose(2, 0, 1)
            # What lies beyond the image is not known to be outside a nucleus, so its edge is no outline.
            labels_SS = np.where(placed.valid_SS, placed.labels_SS, -1)
            targets[row, :, inside, inside] = self.target.encode(labels_SS)
            valid[row, inside, inside] = placed.valid_SS
        ids = tuple(self.samples.ids[self._place(index)] for index in part)
        batch = Batch(torch.from_numpy(images), torch.from_numpy(targets), torch.from_numpy(valid), ids)
        return LoadedBatch(batch, len(planned.indices))


class TrainingLoader:
    """Makes batches ahead of their use in threads, which live as long as the loader: use it as a context manager.

    Threads rather than processes: numpy and OpenCV let go of the interpreter while they compute, nothing is forked
    beneath a network that already runs, and no batch is copied between processes. Measured on images of the nucleus
    data set with all augmentation but joining: 1.06 ms of one core per image in a thread, 1.53 ms in a DataLoader's
    process.
    """

    def __init__(
        self,
        data: TrainingData,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 1,
        pin_memory: bool = False,
        batches_ahead: int = 4,
    ) -> None:
        """`num_threads` 0 makes each batch when it is asked for; `batch_size` is that of all workers together."""
        cv2.setNumThreads(1)  # its own threads would fight with the network's for the same cores
        self.data, self.batch_size, self.rank, self.world_size = data, batch_size, rank, world_size
        self.pin_memory, self.batches_ahead = pin_memory, batches_ahead
        self._pool = ThreadPoolExecutor(num_threads, "nuciseg-loader") if num_threads else None

    def __enter__(self) -> TrainingLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; batches not yet begun are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def num_batches(self) -> int:
        """Batches of an epoch: the same for every worker."""
        return -(-len(self.data.indices) // self.batch_size)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[LoadedBatch]:
        """The batches of an epoch in order, from `first_batch` on; an exception of a thread is raised here."""
        plan = self.data.plan(epoch, self.batch_size)[first_batch:]
        if self._pool is None:
            yield from (self._load(planned, epoch) for planned in plan)
            return
        waiting: deque[Future[LoadedBatch]] = deque()
        try:
            for planned in plan:
                waiting.append(self._pool.submit(self._load, planned, epoch))
                if len(waiting) > self.batches_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _load(self, planned: PlannedBatch, epoch: int) -> LoadedBatch:
        loaded = self.data.load(planned, epoch, self.rank, self.world_size)
        if self.pin_memory and loaded.batch is not None:
            return LoadedBatch(loaded.batch.pin_memory(), loaded.global_size)
        return loaded


# ------------------------------------------------------------------------------------------------- evaluation
def evaluation_batches(indices: Sequence[int], shapes: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Batches of like size, largest first, the same for any number of workers; `shapes[index]` begins with H and W."""
    order = sorted(indices, key=lambda index: (-max(shapes[index][:2]), -min(shapes[index][:2]), index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def evaluation_images(
    samples: SampleStore,
    indices: Sequence[int],
    normalization: NormalizationConfig,
    multiple: int,
    marking: Marking = "as_is",
) -> torch.Tensor:
    """Whole images (B, C, H, W), not augmented, padded at the bottom and the right to a common multiple of `multiple`.

    The padding is raw 0, normalised like its image.
    """
    loaded = [with_marking(samples[index].image_HWC, marking) for index in indices]
    height = round_up(max(image_HWC.shape[0] for image_HWC in loaded), multiple)
    width = round_up(max(image_HWC.shape[1] for image_HWC in loaded), multiple)
    images = np.zeros((len(loaded), loaded[0].shape[2], height, width), np.float32)
    for row, image_HWC in enumerate(loaded):
        rows, columns, _ = image_HWC.shape
        bounds = normalization_bounds(image_HWC, normalization)
        images[row] = padding_value(bounds, normalization)
        images[row, :, :rows, :columns] = normalize(image_HWC, normalization, bounds).transpose(2, 0, 1)
    return torch.from_numpy(images)
