"""The files of a predicted image, each opened with the library that others would use, and when they appear."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import psutil
import pytest
import tifffile
from predicted_windows import PITCH_PX, Drawn, draw
from roifile import roiread
from skimage.draw import polygon2mask

from nuciseg.errors import ConfigError, DataError, ResourceError
from nuciseg.images import read_labels, write_labels_tiff
from nuciseg.outputs import OUTPUT_NAMES, ImageResult, Summary, open_outputs, write_summary
from nuciseg.outputs.canvas import LabelCanvas
from nuciseg.outputs.nuclei import COLUMNS, ReportedNuclei
from nuciseg.outputs.overlay import BAND_PX
from nuciseg.plots import overlay_rgb
from nuciseg.types import Window

FILES = ["a.geojson", "a_masks.tif", "a_measurements.csv", "a_overlay.png", "a_rois.zip"]


def write(
    folder: Path,
    windows: Iterable[Window],
    shape: tuple[int, int],
    names: Iterable[str] = OUTPUT_NAMES,
    um: float | None = None,
) -> Summary:
    with open_outputs(names, folder, "a", shape, um) as outputs:  # type: ignore[arg-type]
        for window in windows:
            outputs.add(window)
    return outputs.summary


@pytest.fixture
def drawn() -> Drawn:
    return draw()


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _rois(path: Path) -> dict[str, np.ndarray]:
    rois = roiread(path)
    assert isinstance(rois, list)
    return {roi.name: np.asarray(roi.coordinates()) for roi in rois}


def _features(path: Path) -> dict[str, dict]:
    collection = json.loads(path.read_text(encoding="utf-8"))
    assert collection["type"] == "FeatureCollection"
    return {feature["properties"]["name"]: feature for feature in collection["features"]}


def _empty(shape: tuple[int, int], top: int = 0, left: int = 0) -> Window:
    nothing = np.zeros(0)
    return Window(
        top, left, np.zeros(shape, np.uint8), np.zeros(shape, np.int32), nothing.astype(np.int64), nothing.astype("f4")
    )


# --- each file ---------------------------------------------------------------------------------------------------


def test_files_of_a_small_image_are_the_plain_ones(tmp_path: Path, drawn: Drawn) -> None:
    write(tmp_path, [drawn.whole()], drawn.labels_HW.shape)
    assert sorted(os.listdir(tmp_path)) == FILES
    np.testing.assert_array_equal(read_labels(tmp_path / "a_masks.tif"), drawn.labels_HW)
    write_labels_tiff(tmp_path / "plain.tif", drawn.labels_HW)
    assert (tmp_path / "a_masks.tif").read_bytes() == (tmp_path / "plain.tif").read_bytes()
    expected = overlay_rgb(drawn.image_HW, drawn.labels_HW, scale=384 // max(drawn.labels_HW.shape))
    np.testing.assert_array_equal(iio.imread(tmp_path / "a_overlay.png"), expected)


def test_rois_filled_as_imagej_does_are_the_nuclei(tmp_path: Path, drawn: Drawn) -> None:
    write(tmp_path, [drawn.whole()], drawn.labels_HW.shape, ["rois"])
    rois = _rois(tmp_path / "a_rois.zip")
    assert set(rois) == {str(label) for label in range(1, drawn.num_nuclei + 1)}
    for name, corners_P2 in rois.items():
        filled_HW = polygon2mask(drawn.labels_HW.shape, corners_P2[:, ::-1] - 0.5)
        np.testing.assert_array_equal(filled_HW, drawn.labels_HW == int(name))


@pytest.mark.parametrize("left", [0, 40_000, 70_000])
def test_rois_far_to_the_right_keep_their_place(tmp_path: Path, drawn: Drawn, left: int) -> None:
    """ImageJ's 16 bits end at 60,535; beyond, places are floats."""
    window = drawn.whole()
    write(tmp_path / "moved", [replace(window, left_px=left)], (200, left + 500), ["rois"])
    write(tmp_path / "here", [window], (200, 500), ["rois"])
    here, there = _rois(tmp_path / "here" / "a_rois.zip"), _rois(tmp_path / "moved" / "a_rois.zip")
    for name, corners_P2 in here.items():
        np.testing.assert_array_equal(there[name], corners_P2 + np.array([left, 0]))


def test_geojson_has_a_detection_for_qupath_a_nucleus(tmp_path: Path, drawn: Drawn) -> None:
    write(tmp_path, [drawn.whole()], drawn.labels_HW.shape, ["geojson", "measurements"], um=0.5)
    features = _features(tmp_path / "a.geojson")
    table = _table(tmp_path / "a_measurements.csv")
    assert list(features) == [row["label"] for row in table]
    for row in table:
        feature = features[row.pop("label")]
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert {name: str(value) for name, value in properties["measurements"].items()} == row
        [ring] = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        area_px = cv2.contourArea(np.array(ring, np.int32))
        assert area_px == properties["measurements"]["area_px"]


def test_micrometres_follow_the_pixel_size(tmp_path: Path, drawn: Drawn) -> None:
    write(tmp_path / "known", [drawn.whole()], drawn.labels_HW.shape, ["measurements"], um=0.5)
    write(tmp_path / "unknown", [drawn.whole()], drawn.labels_HW.shape, ["measurements", "geojson"])
    for known, unknown in zip(
        _table(tmp_path / "known" / "a_measurements.csv"),
        _table(tmp_path / "unknown" / "a_measurements.csv"),
        strict=True,
    ):
        assert tuple(known) == tuple(unknown) == COLUMNS
        assert float(known["area_um2"]) == float(known["area_px"]) / 4
        for name in ("centroid_row", "centroid_column", "diameter"):
            assert float(known[f"{name}_um"]) == pytest.approx(float(known[f"{name}_px"]) / 2, rel=1e-7)
        assert {name for name in COLUMNS if unknown[name] == ""} == {name for name in COLUMNS if "_um" in name}
    for feature in _features(tmp_path / "unknown" / "a.geojson").values():
        assert not [name for name in feature["properties"]["measurements"] if "_um" in name]


# --- windows -----------------------------------------------------------------------------------------------------


def test_two_windows_give_the_files_of_one(tmp_path: Path, drawn: Drawn) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shape = drawn.labels_HW.shape
    assert write(one, [drawn.whole()], shape, um=0.3) == pytest.approx(write(two, drawn.halves()[::-1], shape, um=0.3))
    for name in ("a_masks.tif", "a_overlay.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    rows = [_table(folder / "a_measurements.csv") for folder in (one, two)]
    assert sorted(rows[1], key=lambda row: int(row["label"])) == rows[0]
    assert _features(one / "a.geojson") == _features(two / "a.geojson")
    rois = [_rois(folder / "a_rois.zip") for folder in (one, two)]
    assert rois[0].keys() == rois[1].keys()
    assert all(np.array_equal(rois[0][name], rois[1][name]) for name in rois[0])


def test_the_first_window_keeps_a_pixel_that_two_claim(tmp_path: Path) -> None:
    labels_HW = np.ones((4, 4), np.int32)
    first, second = (
        Window(0, left, np.zeros((4, 4), np.uint8), labels_HW, np.array([number]), np.ones(1, np.float32))
        for left, number in ((0, 1), (2, 2))
    )
    write(tmp_path, [first, second], (4, 6), ["masks"])
    assert read_labels(tmp_path / "a_masks.tif").tolist() == [[1, 1, 1, 1, 2, 2]] * 4


def test_what_no_window_covers_is_background(tmp_path: Path, drawn: Drawn) -> None:
    shape = (drawn.labels_HW.shape[0] + 10, drawn.labels_HW.shape[1] + 20)
    write(tmp_path, [drawn.whole()], shape)
    labels_HW = read_labels(tmp_path / "a_masks.tif")
    assert labels_HW.shape == shape
    assert labels_HW[:-10, :-20].any()
    assert not labels_HW[-10:].any()
    assert not labels_HW[:, -20:].any()


def test_a_large_image_has_a_tiled_mask_and_a_reduced_picture(tmp_path: Path) -> None:
    """Windows that do not begin at the squares that are reduced to one pixel."""
    shape = (403, 8201)
    drawn = draw(shape[0] // PITCH_PX, shape[1] // PITCH_PX)
    labels_HW = np.zeros(shape, np.int32)
    image_HW = np.full(shape, 250, np.uint16)
    inside = tuple(slice(0, length) for length in drawn.labels_HW.shape)
    labels_HW[inside], image_HW[inside] = drawn.labels_HW, drawn.image_HW
    field = Drawn(image_HW, labels_HW)
    write(tmp_path / "one", [field.whole()], shape, ["masks", "overlay"])
    write(tmp_path / "two", field.halves(), shape, ["masks", "overlay"])
    with tifffile.TiffFile(tmp_path / "two" / "a_masks.tif") as tiff:
        assert tiff.pages.first.is_tiled
        assert not tiff.is_bigtiff
        assert tiff.pages.first.compression == 8
    np.testing.assert_array_equal(read_labels(tmp_path / "two" / "a_masks.tif"), labels_HW)
    picture = iio.imread(tmp_path / "two" / "a_overlay.png")
    assert picture.shape == (135, 2734, 3)
    np.testing.assert_array_equal(picture, iio.imread(tmp_path / "one" / "a_overlay.png"))
    reduced_HW = cv2.resize(image_HW[:402, :8199].astype(np.float32), (2733, 134), interpolation=cv2.INTER_AREA)
    expected = overlay_rgb(reduced_HW, labels_HW[1:402:3, 1:8199:3])
    differs_HW = np.abs(expected[:-1, :-1].astype(int) - picture[:133, :2732]).max(axis=2) > 2
    assert differs_HW.mean() < 0.001


def test_a_tall_picture_has_no_seams(tmp_path: Path) -> None:
    """It is drawn some rows at a time."""
    drawn = draw(46, 3)
    assert drawn.labels_HW.shape[0] > 2 * BAND_PX
    assert drawn.labels_HW[BAND_PX - 1 : BAND_PX + 1].any()
    write(tmp_path, [drawn.whole()], drawn.labels_HW.shape, ["overlay"])
    np.testing.assert_array_equal(iio.imread(tmp_path / "a_overlay.png"), overlay_rgb(drawn.image_HW, drawn.labels_HW))


def test_a_mask_too_large_for_a_classic_tiff_is_a_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nuciseg.outputs.canvas.CLASSIC_TIFF_BYTES", 10**5)  # four billion take too long
    write(tmp_path, [_empty((8, 5000))], (8, 5000), ["masks"])
    with tifffile.TiffFile(tmp_path / "a_masks.tif") as tiff:
        assert tiff.is_bigtiff
    assert read_labels(tmp_path / "a_masks.tif").shape == (8, 5000)


def test_the_labels_of_a_large_image_do_not_stay_in_memory(tmp_path: Path) -> None:
    """What was read through a map is the process' memory until it is released."""

    def resident_bytes() -> int:
        return int(psutil.Process().memory_info().rss)

    canvas = LabelCanvas(tmp_path / "canvas", (10_000, 5_000))
    before = resident_bytes()
    assert canvas.labels.max() == 0
    assert resident_bytes() - before > 150e6, "nothing was read"
    canvas.paint(ReportedNuclei(_empty((8, 8)), (10_000, 5_000), None))
    assert resident_bytes() - before < 50e6
    assert canvas.labels[-1, -1] == 0
    canvas.close()


def test_ids_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    side = 265
    ids_HW = np.arange(side * side, dtype=np.int32).reshape(side, side)
    labels_HW = np.kron(ids_HW, np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]], np.int32))
    num_nuclei = side * side - 1
    window = Window(
        0, 0, (labels_HW % 200).astype(np.uint8), labels_HW, np.arange(1, num_nuclei + 1), np.ones(num_nuclei, "f4")
    )
    summary = write(tmp_path, [window], labels_HW.shape, ["masks", "overlay"])
    assert summary.num_nuclei == num_nuclei == 70_224
    np.testing.assert_array_equal(read_labels(tmp_path / "a_masks.tif"), labels_HW)


def test_ids_are_those_given_in_every_file(tmp_path: Path, drawn: Drawn) -> None:
    window = drawn.whole()
    window = replace(window, ids_N=np.where(window.ids_N % 2, window.ids_N + 400_000, 0))
    write(tmp_path, [window], drawn.labels_HW.shape)
    expected = {str(number) for number in window.ids_N if number}
    assert {row["label"] for row in _table(tmp_path / "a_measurements.csv")} == expected
    assert _rois(tmp_path / "a_rois.zip").keys() == _features(tmp_path / "a.geojson").keys() == expected
    labels_HW = read_labels(tmp_path / "a_masks.tif")
    np.testing.assert_array_equal(labels_HW, np.append(0, window.ids_N)[drawn.labels_HW])


def test_no_nuclei_give_valid_empty_files(tmp_path: Path) -> None:
    assert write(tmp_path, [_empty((50, 40))], (50, 40), um=0.5) == Summary(0)
    assert not read_labels(tmp_path / "a_masks.tif").any()
    assert _features(tmp_path / "a.geojson") == {}
    assert roiread(tmp_path / "a_rois.zip") == []
    assert (tmp_path / "a_measurements.csv").read_text() == ",".join(COLUMNS) + "\n"
    assert iio.imread(tmp_path / "a_overlay.png").shape == (350, 280, 3)


# --- when files appear --------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_written(tmp_path: Path, drawn: Drawn) -> None:
    summary = write(tmp_path, [drawn.whole()], drawn.labels_HW.shape, ["overlay"])
    assert os.listdir(tmp_path) == ["a_overlay.png"]
    assert summary.num_nuclei == drawn.num_nuclei


def test_files_appear_at_the_end_and_replace_older_ones(tmp_path: Path, drawn: Drawn) -> None:
    (tmp_path / "a_measurements.csv").write_text("old")
    with open_outputs(OUTPUT_NAMES, tmp_path, "a", drawn.labels_HW.shape, None) as outputs:
        outputs.add(drawn.whole())
        assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["a_measurements.csv"]
        assert (tmp_path / "a_measurements.csv").read_text() == "old"
    assert len(_table(tmp_path / "a_measurements.csv")) == drawn.num_nuclei


def test_an_interruption_at_the_very_end_leaves_nothing_hidden(
    tmp_path: Path, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def interrupted(*args: object, **options: object) -> None:
        monkeypatch.setattr(shutil, "rmtree", remove)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [drawn.whole()], drawn.labels_HW.shape)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(tmp_path: Path, drawn: Drawn, error: type[BaseException]) -> None:
    (tmp_path / "a_masks.tif").write_text("old")

    def windows() -> Iterator[Window]:
        yield drawn.whole()
        raise error

    with pytest.raises(error):
        write(tmp_path, windows(), drawn.labels_HW.shape)
    assert os.listdir(tmp_path) == ["a_masks.tif"]
    assert (tmp_path / "a_masks.tif").read_text() == "old"


@contextmanager
def _files_end_at(num_bytes: int) -> Iterator[None]:
    """As a disk that is full: the system refuses to let a file grow beyond `num_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", OUTPUT_NAMES)
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    drawn = draw(16, 16)
    (tmp_path / "a_masks.tif").write_text("old")
    with pytest.raises(ResourceError, match=rf"{tmp_path}.* cannot be written"), _files_end_at(2000):
        write(tmp_path, [drawn.whole()] * 2, drawn.labels_HW.shape, [name])
    assert os.listdir(tmp_path) == ["a_masks.tif"]
    assert (tmp_path / "a_masks.tif").read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_said(tmp_path: Path, drawn: Drawn) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="cannot be written"):
        write(tmp_path, [drawn.whole()], drawn.labels_HW.shape)
    assert os.listdir(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_said(tmp_path: Path, drawn: Drawn) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ResourceError, match="out cannot be written"):
        write(tmp_path / "out", [drawn.whole()], drawn.labels_HW.shape)


def test_a_folder_in_place_of_a_file_is_said(tmp_path: Path, drawn: Drawn) -> None:
    (tmp_path / "a.geojson").mkdir()
    with pytest.raises(ResourceError, match=r"a\.geojson cannot be written"):
        write(tmp_path, [drawn.whole()], drawn.labels_HW.shape, ["geojson"])
    assert os.listdir(tmp_path) == ["a.geojson"]


def test_an_unknown_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no output 'rio'; choose from masks, overlay, rois"):
        write(tmp_path, [], (4, 4), ["rio"])


@pytest.mark.parametrize("um", [0.0, -1.0, float("nan"), float("inf")])
def test_a_pixel_size_is_a_positive_number(tmp_path: Path, um: float) -> None:
    with pytest.raises(DataError, match="pixel size"):
        write(tmp_path, [], (4, 4), um=um)
    assert os.listdir(tmp_path) == []


# --- the batch ----------------------------------------------------------------------------------------------------


def test_the_summary_is_over_all_nuclei(tmp_path: Path, drawn: Drawn) -> None:
    summary = write(tmp_path, drawn.halves(), drawn.labels_HW.shape, ["measurements"], um=0.5)
    table = _table(tmp_path / "a_measurements.csv")
    columns = {name: np.array([float(row[name]) for row in table]) for name in COLUMNS}
    assert summary.num_nuclei == len(table)
    assert summary.median_area_px == np.median(columns["area_px"])
    assert summary.median_diameter_px == pytest.approx(np.median(columns["diameter_px"]))
    assert summary.median_diameter_um == pytest.approx(np.median(columns["diameter_um"]))
    assert summary.mean_intensity == pytest.approx(drawn.image_HW[drawn.labels_HW > 0].mean())


def test_the_batch_has_a_row_for_each_image(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.csv"
    done = ImageResult("a.tif", Summary(3, 100.0, 11.283792, 5.641896, 812.5), pixel_size_um=0.5, diameter_px=12.0)
    failed = ImageResult('b, "2".tif', reason="it is truncated; replace it.")
    write_summary(path, [done, failed, ImageResult(os.fsdecode(b"\xff.tif"), Summary(0))])
    assert b"\n\xff.tif,done,,0," in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"\xff", b""))
    first, second, third = _table(path)
    assert first == {
        "file": "a.tif", "status": "done", "reason": "", "num_nuclei": "3", "median_area_px": "100.0",
        "median_diameter_px": "11.283792", "median_diameter_um": "5.641896", "mean_intensity": "812.5",
        "pixel_size_um": "0.5", "diameter_used_px": "12.0",
    }  # fmt: skip
    assert (second["file"], second["status"], second["num_nuclei"]) == ('b, "2".tif', "failed", "")
    assert second["reason"] == "it is truncated; replace it."
    assert (third["status"], third["num_nuclei"], third["median_area_px"]) == ("done", "0", "")
