"""Images that belong to no data set: which network is for them, at what scale, and the function for Python."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from drawn_fields import draw_discs, hand_made_network
from numpy.typing import NDArray

import nuciseg
import nuciseg.predict
from nuciseg.data.cutting import CutSettings, cut_field
from nuciseg.data.synthetic import SyntheticConfig, cluster_seed, draw_cluster, draw_field
from nuciseg.distributed import prediction
from nuciseg.engine.checkpoint import find_checkpoint, load_checkpoint
from nuciseg.engine.datasets import open_samples, open_training_set
from nuciseg.engine.fields import ArrayPixels, assembled
from nuciseg.engine.files import Diameter, Request, predict_file
from nuciseg.engine.inference import predict_instances
from nuciseg.engine.nucleus_size import scale_for
from nuciseg.engine.prediction import Plan, Predictor, loaded_predictor, looks_cut_out
from nuciseg.errors import CheckpointError, ConfigError, DataError, ResourceError
from nuciseg.types import Diameters

KNOWN = Diameters(10.0, 20.0, 40.0)


def hand_made(for_clusters: bool | None = False, trained_on: Diameters | None = KNOWN) -> Predictor:
    return Predictor(hand_made_network(), Path("by/hand"), trained_on, for_clusters)


def clusters(**drawing: object) -> list[NDArray[np.generic]]:
    config = SyntheticConfig(**{"num_test": 8, "seed": 1, **drawing})
    drawn = [draw_cluster(config, cluster_seed(config, "test", index)) for index in range(8)]
    return [each.image_HWC[..., 0] for each in drawn]


# ---------------------------------------------------------------------------------------- clusters cut out on black
@pytest.mark.parametrize(
    "drawing",
    [
        {},
        {"nuclei_per_cluster": (1, 1)},
        {"nuclei_per_cluster": (8, 12)},
        {"mean_diameter_px": 16.0},
        {"mean_diameter_px": 120.0},
        {"overlap": 0.0},
    ],
)
def test_drawn_clusters_are_known_as_cut_out(drawing: dict[str, object]) -> None:
    for image_HW in clusters(**drawing):
        assert looks_cut_out(ArrayPixels(image_HW))
        assert looks_cut_out(ArrayPixels(image_HW), and_marked=True)


@pytest.mark.parametrize("marking", ["drawn", "none"])
@pytest.mark.parametrize(
    ("gap_px", "scale", "keep_edge"), [(0, 1, False), (6, 1, False), (0, 0.6, True), (0, 2, False)]
)
def test_what_cut_writes_is_known_as_cut_out(marking: str, gap_px: float, scale: float, keep_edge: bool) -> None:
    settings = CutSettings(marking=marking, gap_px=gap_px, scale=scale, keep_edge=keep_edge)
    config = SyntheticConfig(mean_diameter_px=30.0)
    fields = [draw_field(config, cluster_seed(config, "test", index), 256, 256) for index in range(3)]
    cut = [cluster.image_HWC[..., 0] for field in fields for cluster in cut_field(field, settings).clusters]
    assert len(cut) > 3
    assert all(looks_cut_out(ArrayPixels(image_HW)) for image_HW in cut)
    if gap_px == 0:
        assert all(looks_cut_out(ArrayPixels(image_HW), and_marked=True) == (marking == "drawn") for image_HW in cut)


def test_fields_are_no_clusters() -> None:
    field_HW, labels_HW = draw_discs((300, 300), 20)
    without_background_HW = np.where(labels_HW > 0, field_HW, 0)
    noise_HW = np.where(np.random.default_rng(0).random(field_HW.shape) < 0.05, 1, without_background_HW)
    one_nucleus_HW = np.where(labels_HW == 1, field_HW, 0)
    overexposed_HW = np.where(labels_HW == 1, 65535, 0) - np.where(labels_HW == 1, field_HW, 0) // 3
    for image_HW in (
        field_HW,
        without_background_HW,
        noise_HW,
        np.zeros((50, 50), np.uint8),
        np.ones((1, 1), np.uint8),
    ):
        assert not looks_cut_out(ArrayPixels(image_HW))
    for image_HW in (one_nucleus_HW, overexposed_HW):
        assert not looks_cut_out(ArrayPixels(image_HW.astype(np.uint16)), and_marked=True)


@pytest.mark.parametrize(("for_clusters", "cluster_is", "field_is"), [(True, 1, 0), (False, 0, 1), (None, 1, 1)])
def test_the_wrong_sort_of_image_is_refused(for_clusters: bool | None, cluster_is: int, field_is: int) -> None:
    predictor = hand_made(for_clusters)
    for image_HW, is_right, named in (
        (clusters()[0], cluster_is, "separator"),
        (draw_discs((80, 80), 20)[0], field_is, "fields"),
    ):
        if is_right:
            assert predictor.instances(image_HW).labels_HW.shape == image_HW.shape
        else:
            with pytest.raises(DataError, match=rf"^x\.png is .*by/hand.*take --checkpoint nuciseg/{named}"):
                predictor.instances(image_HW, "x.png")


# --------------------------------------------------------------------------------------------------------- plans
def test_a_cluster_is_one_window_at_its_own_resolution(tiny_checkpoint: Path) -> None:
    predictor = Predictor.load(tiny_checkpoint, torch.device("cpu"))
    image_HW = np.zeros((700, 1300), np.uint8)
    image_HW[100:600, 100:1250] = 9
    plan = predictor.plan(ArrayPixels(image_HW), "x", tile_px=256)
    assert (plan.grid.scale, plan.estimated, plan.diameter_px) == (1, False, None)
    assert len(plan.grid.spans(700)) == len(plan.grid.spans(1300)) == 1


def test_a_cluster_alone_gets_what_it_gets_in_a_data_set(tiny_checkpoint: Path) -> None:
    predictor = Predictor.load(tiny_checkpoint, torch.device("cpu"))
    samples = open_samples(predictor.network.config.data, "train")
    ((seen, expected),) = predict_instances(predictor.network, samples, [4])
    found = predictor.instances(samples[4].image_HWC[..., 0])
    assert np.array_equal(found.labels_HW, expected.labels_HW)
    assert expected.labels_HW.any()
    assert found.num_open_borders == predictor.network.target.open_borders(seen.maps_KHW)


def test_the_scale_comes_from_the_diameter() -> None:
    pixels = ArrayPixels(draw_discs((400, 400), 80)[0])
    given = hand_made().plan(pixels, "x", 80.0)
    assert (given.diameter_px, given.estimated) == (80.0, False)
    assert given.grid.scale == pytest.approx(0.25, rel=0.05)
    estimated = hand_made().plan(pixels, "x")
    assert estimated.estimated
    assert estimated.grid.scale == pytest.approx(0.25, rel=0.3)
    unknown = hand_made(trained_on=None).plan(pixels, "x")
    assert (unknown.grid.scale, unknown.diameter_px, unknown.estimated) == (1, None, False)


@pytest.mark.parametrize("tile_px", [512, 2048])
@pytest.mark.parametrize("diameter_px", [5.0, 30.0, 45.0, 80.0, 160.0, 300.0])
def test_a_tile_is_bounded_in_pixels_of_the_image(diameter_px: float, tile_px: int) -> None:
    image_HW = np.broadcast_to(np.uint16(7), (12_000, 12_000))
    grid = hand_made().plan(ArrayPixels(image_HW), "x", diameter_px, tile_px).grid
    least_px = 256 * diameter_px / KNOWN.typical_px  # what the network sees is never less
    assert grid.tile_px <= max(2 * tile_px, least_px) + least_px
    assert grid.network_px <= tile_px
    assert grid.network_px % 256 == 0
    assert grid.scale == pytest.approx(scale_for(diameter_px, KNOWN), rel=0.04)


def test_large_nuclei_are_the_same_in_tiles() -> None:
    predictor = hand_made()
    image_HW, labels_HW = draw_discs((1100, 1250), 110, least_gap=1.1, share=0.3)
    plan = predictor.plan(ArrayPixels(image_HW), "x", 80.0, tile_px=256)
    assert len(plan.grid.spans(1100)) == len(plan.grid.spans(1250)) == 2
    one = Plan(replace(plan.grid, tile_px=8 * plan.grid.tile_px, network_px=8 * plan.grid.network_px), 80.0, False)
    tiled, whole = (
        assembled(predictor.windows(ArrayPixels(image_HW), each), image_HW.shape).labels_HW for each in (plan, one)
    )
    assert tiled.max() == whole.max() == labels_HW.max() > 20
    assert len(np.unique(tiled * 1000 + whole)) == whole.max() + 1, "to the pixel"


@pytest.mark.parametrize("for_clusters", [True, False])
def test_nuclei_far_larger_than_the_image_are_refused(for_clusters: bool) -> None:
    image_HW = clusters()[0] if for_clusters else draw_discs((100, 128), 20)[0]
    height, width = image_HW.shape
    said = rf"^nuclei of 3000 px are larger than x.tif \({height} x {width} px\); check --diameter and the size of a "
    with pytest.raises(DataError, match=said):
        hand_made(for_clusters).plan(ArrayPixels(image_HW), "x.tif", 3000.0)
    assert hand_made(for_clusters).plan(ArrayPixels(image_HW), "x.tif", 2.0 * max(height, width))


@pytest.mark.parametrize(("text", "length", "unit"), [("30", 30, "px"), (" 8.5 um", 8.5, "um"), ("8µm", 8, "um")])
def test_a_diameter_has_a_unit(text: str, length: float, unit: str) -> None:
    assert Diameter.parse(text) == Diameter(length, unit)


# ----------------------------------------------------------------------------------------------------------- files
def test_an_image_of_large_values_that_hardly_differ_is_no_trouble() -> None:
    image_HW = np.full((60, 60), 1e7, np.float32)
    image_HW[20:40, 20:40] += 1
    assert hand_made().instances(image_HW).labels_HW.shape == (60, 60)


def test_more_nuclei_than_16_bits_can_number(tmp_path: Path) -> None:
    rows, columns = 260, 256
    image_HW = np.full((rows * 8, columns * 8), 400, np.uint16)
    for row in range(6):
        for column in range(6):
            image_HW[row + 1 :: 8, column + 1 :: 8] = 4000
    tifffile.imwrite(tmp_path / "x.tif", image_HW)
    shares: list[float] = []
    request = Request(("masks",), tmp_path / "out", tile_px=512)
    result = predict_file(hand_made(trained_on=None), tmp_path / "x.tif", request, shares.append)
    labels_HW = tifffile.imread(tmp_path / "out" / "x_masks.tif")
    assert result.row.summary is not None
    assert result.row.summary.num_nuclei == labels_HW.max() == len(np.unique(labels_HW)) - 1 == rows * columns > 65535
    assert shares == pytest.approx(np.arange(1, len(shares) + 1) / len(shares)), "what a bar shows"
    assert len(shares) > 4


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("shapes differ"), False),
        ("cv2", True),
    ],
)
def test_an_image_too_large_for_the_memory_is_one_sentence(
    error: Exception | str, is_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_memory(*everything: object) -> None:
        if isinstance(error, Exception):
            raise error
        cv2.resize(np.zeros((9, 9), np.float32), (2**20, 2**20 - 1))

    monkeypatch.setattr(prediction, "predict_file", fill_the_memory)
    result = partial(prediction._result, hand_made(), Path("x.tif"), Request(("masks",), Path("out")))
    if not is_memory:
        with pytest.raises(type(error)):
            result()
        return
    row = result().row
    assert row.summary is None
    assert row.reason == (
        "x.tif takes more memory than there is; check --diameter, give a smaller --tile-px, or take a machine with more"
    )


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "x.tif", draw_discs((80, 80), 20)[0])

    def no_space(*paths: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nuciseg.outputs.os.replace", no_space)
    with pytest.raises(ResourceError, match=r"cannot be written \(No space left on device\)"):
        predict_file(hand_made(), tmp_path / "x.tif", Request(("masks", "overlay"), tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------------------------------------------------- Python
def test_the_function_finds_what_the_network_does(tiny_fields_run: Path) -> None:
    image_HW, labels_HW = draw_discs((130, 140), 18, seed=8)
    importlib.import_module("nuciseg.predict")
    found = nuciseg.predict(image_HW, checkpoint=tiny_fields_run)
    assert found.labels_HW.shape == image_HW.shape
    assert found.labels_HW.dtype == np.int32
    assert len(found.confidences_N) == found.labels_HW.max() == pytest.approx(labels_HW.max(), abs=3)
    for same in (image_HW.astype(np.float64), image_HW.astype(">u2"), image_HW.astype(np.int64), image_HW.tolist()):
        assert np.array_equal(nuciseg.predict(same, checkpoint=str(tiny_fields_run)).labels_HW, found.labels_HW)
    named = nuciseg.predict.predict(image_HW, checkpoint=tiny_fields_run, diameter_px=18)
    assert np.array_equal(named.labels_HW, found.labels_HW)


def test_a_network_is_kept_as_long_as_its_files_are(tiny_fields_run: Path, tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(find_checkpoint(tiny_fields_run), folder)
    kept = loaded_predictor(folder)
    assert loaded_predictor(tmp_path / "." / "checkpoint") is kept
    shutil.rmtree(folder)
    shutil.copytree(find_checkpoint(tiny_run), folder)
    assert loaded_predictor(folder).for_clusters
    assert not kept.for_clusters
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="does not exist"):
        loaded_predictor(folder)


@pytest.mark.parametrize("image", [np.ones((4, 4, 3)), np.ones(4), np.ones((0, 4)), np.ones((4, 4), bool), "x.png"])
def test_what_is_no_grey_image_is_refused(image: object) -> None:
    with pytest.raises(DataError, match="cannot be predicted; give one grey plane of numbers, rows x columns"):
        nuciseg.predict(image)


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(DataError, match="rows of an image must all be of one length"):
        nuciseg.predict([[1, 2, 3], [4, 5]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_refused(value: float) -> None:
    image_HW = np.ones((5, 5), np.float32)
    image_HW[2, 1:3] = value
    with pytest.raises(DataError, match="2 pixels of the image are NaN or infinite"):
        nuciseg.predict(image_HW)


@pytest.mark.parametrize("diameter_px", [0, -3, 0.5, float("nan"), float("inf")])
def test_a_diameter_that_is_no_size_is_refused(diameter_px: float) -> None:
    with pytest.raises(ConfigError, match="is no size; give the width of a nucleus in pixels"):
        nuciseg.predict(np.ones((5, 5)), diameter_px=diameter_px)


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        nuciseg.predict(np.ones((5, 5)), checkpoint=tmp_path)


def test_a_checkpoint_says_which_images_it_is_for(tiny_fields_run: Path, tiny_checkpoint: Path) -> None:
    of_fields, of_clusters = (Predictor.load(path, torch.device("cpu")) for path in (tiny_fields_run, tiny_checkpoint))
    assert (of_fields.for_clusters, of_clusters.for_clusters) == (False, True)
    for predictor in (of_fields, of_clusters):
        loaded = load_checkpoint(predictor.checkpoint)
        assert loaded.diameters is not None
        measured = open_training_set(loaded.config, predictor.network.stride).diameters()
        assert loaded.diameters == measured
        assert measured.low_px <= measured.typical_px <= measured.high_px
