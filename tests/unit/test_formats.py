"""Data-set layouts: what is found in a folder, what a drawn border encloses, and what is said about bad input."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import cv2
import imageio.v3 as iio
import numpy as np
import pytest
import tifffile

from nuciseg.data.formats import FormatName, detect_format, get_format, labels, nucleus, synthetic
from nuciseg.data.formats.folders import splits_there
from nuciseg.errors import ConfigError, DataError


def draw_cluster(height: int = 60, width: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Two touching nuclei: a box with a wall between them, its outline drawn into the image."""
    image_HW, solution_HW = np.zeros((2, height, width), np.uint8)
    cv2.rectangle(image_HW, (10, 10), (80, 50), 90, -1)
    for canvas in (image_HW, solution_HW):
        cv2.rectangle(canvas, (10, 10), (80, 50), 255, 3)
    cv2.line(solution_HW, (45, 10), (45, 50), 255, 3)
    return image_HW, solution_HW


def write_pair(folder: Path, name: str, image_HW: np.ndarray, solution_HW: np.ndarray) -> None:
    (folder / "solutions").mkdir(parents=True, exist_ok=True)
    iio.imwrite(folder / name, image_HW)
    iio.imwrite(folder / "solutions" / name, solution_HW)


@pytest.fixture
def nucleus_root(tmp_path: Path) -> Path:
    image_HW, solution_HW = draw_cluster()
    for number in range(3):
        image_HW[20, 20 + number] = 91  # each image its own
        write_pair(tmp_path / "train", f"{number}_crop.png", image_HW, solution_HW)
    return tmp_path


@pytest.fixture
def labels_root(tmp_path: Path) -> Path:
    for name in ("images", "masks"):
        (tmp_path / "train" / name).mkdir(parents=True)
    for number in range(3):
        pixels = np.full((20, 30), 100 + number, np.uint16)
        tifffile.imwrite(tmp_path / "train" / "images" / f"im{number}.tif", pixels)
        tifffile.imwrite(tmp_path / "train" / "masks" / f"im{number}.tif", pixels - 100)
    return tmp_path


def test_nucleus_records(nucleus_root: Path) -> None:
    assert detect_format(nucleus_root).NAME == "nucleus"
    records = nucleus.read(nucleus_root, "train")
    assert [record.id for record in records] == ["0_crop", "1_crop", "2_crop"]
    assert [record.group for record in records] == [record.id for record in records]
    flat = nucleus_root / "train"
    assert detect_format(flat).NAME == "nucleus"
    for split in ("train", "test", "anything"):
        assert nucleus.read(flat, split) == records


def test_a_part_counts_more_than_what_lies_beside_it(nucleus_root: Path) -> None:
    image_HW, solution_HW = draw_cluster()
    write_pair(nucleus_root, "beside.png", image_HW, solution_HW)
    assert [record.id for record in nucleus.read(nucleus_root, "train")] == ["0_crop", "1_crop", "2_crop"]
    assert [record.id for record in nucleus.read(nucleus_root, "test")] == ["beside"]


def test_16_bit_images_hold_the_same_nuclei(nucleus_root: Path) -> None:
    record = nucleus.read(nucleus_root, "train")[0]
    eight = nucleus.load(record)
    iio.imwrite(nucleus_root / "train" / "0_crop.png", eight.image_HWC[..., 0].astype(np.uint16) * 257)
    sixteen = nucleus.load(record)
    assert sixteen.image_HWC.dtype == np.uint16
    assert sixteen.image_HWC.max() == 65535
    np.testing.assert_array_equal(sixteen.labels_HW, eight.labels_HW)


def test_nuclei_touch_and_cover_the_line(nucleus_root: Path) -> None:
    sample = nucleus.load(nucleus.read(nucleus_root, "train")[0])
    image_HW, solution_HW = draw_cluster()
    assert sample.image_HWC.shape == (60, 100, 1)
    assert sample.image_HWC.dtype == np.uint8
    assert sample.labels_HW.dtype == np.int32
    np.testing.assert_array_equal(sample.labels_HW > 0, (image_HW > 0) | (solution_HW > 0))
    assert sample.labels_HW[30, 44] == 1  # the wall is shared at its middle
    assert sample.labels_HW[30, 46] == 2
    assert set(np.unique(sample.labels_HW)) == {0, 1, 2}


def test_holes_specks_and_regions_at_the_edge_are_no_nuclei() -> None:
    image_HW, solution_HW = draw_cluster(120, 100)
    # A hole larger than both nuclei together: black in the image, enclosed in the solution.
    for canvas in (image_HW, solution_HW):
        cv2.rectangle(canvas, (5, 60), (95, 110), 255, 3)
    cv2.circle(solution_HW, (25, 30), 3, 255, 1)  # encloses a speck of bright pixels inside a nucleus
    image_HW[0:8, 85:] = 120  # something bright that the edge cuts
    cv2.line(solution_HW, (84, 0), (84, 8), 255, 1)
    cv2.line(solution_HW, (84, 8), (99, 8), 255, 1)
    labels_HW = nucleus.labels_from_solution(image_HW, solution_HW)
    assert set(np.unique(labels_HW)) == {0, 1, 2}
    assert labels_HW[85, 50] == 0
    assert labels_HW[3, 95] == 0
    assert labels_HW[8, 90] == 0  # a stray line far from any nucleus belongs to none
    assert labels_HW[30, 60] == 2


def test_hole_larger_than_a_nucleus_is_told_by_its_intensity() -> None:
    image_HW, solution_HW = draw_cluster()
    image_HW[12:49, 47:79] = 0
    labels_HW = nucleus.labels_from_solution(image_HW, solution_HW)
    assert labels_HW.max() == 1
    assert labels_HW[30, 60] == 0


def test_duplicate_images_share_a_group(nucleus_root: Path) -> None:
    data = (nucleus_root / "train" / "1_crop.png").read_bytes()
    (nucleus_root / "train" / "9_crop.png").write_bytes(data)
    solution = nucleus_root / "train" / "solutions"
    (solution / "9_crop.png").write_bytes((solution / "1_crop.png").read_bytes())
    groups = {record.id: record.group for record in nucleus.read(nucleus_root, "train")}
    assert groups == {"0_crop": "0_crop", "1_crop": "1_crop", "2_crop": "2_crop", "9_crop": "1_crop"}


def test_a_table_says_which_clusters_share_a_field(nucleus_root: Path) -> None:
    table = nucleus_root / "train" / "groups.csv"
    table.write_text("id,group\n0_crop,A\n1_crop,B\n2_crop,A\n")
    assert [record.group for record in nucleus.read(nucleus_root, "train")] == ["A", "B", "A"]
    table.write_text("id,group\n0_crop,A\n")
    with pytest.raises(DataError, match=r"groups\.csv has no group for 1_crop, 2_crop"):
        nucleus.read(nucleus_root, "train")


def test_the_splits_of_a_folder(tmp_path: Path) -> None:
    assert splits_there(tmp_path, labels.holds) == ()
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    assert splits_there(tmp_path, labels.holds) == ("train",)
    (tmp_path / "train").mkdir()
    own_and_root = splits_there(tmp_path, labels.holds)
    assert own_and_root == ("train", "test"), "the folder itself serves as the part that it lacks"
    (tmp_path / "masks").rmdir()
    assert splits_there(tmp_path, labels.holds) == ("train",)
    (tmp_path / "stage1_test").mkdir()
    assert splits_there(tmp_path, labels.holds) == ("train", "test")


def test_hidden_and_foreign_files_are_left_out(nucleus_root: Path) -> None:
    (nucleus_root / "train" / "._0_crop.png").write_bytes(b"resource fork")
    (nucleus_root / "train" / "notes.txt").write_text("nothing")
    assert len(nucleus.read(nucleus_root, "train")) == 3


def remove_solutions(root: Path) -> None:
    for path in (root / "train" / "solutions").iterdir():
        path.unlink()


def remove_everything(root: Path) -> None:
    remove_solutions(root)
    for path in (root / "train").glob("*.png"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "split", "message"),
    [
        (lambda root: None, "test", r"folder \S+test does not exist"),
        (lambda root: (root / "train/solutions").rename(root / "other"), "train", r"train/solutions does not exist"),
        (remove_everything, "train", r"train holds no images \(\.png\)"),
        (remove_solutions, "train", r"3 of 3 images in \S+train have no solution .*: 0_crop, 1_crop, 2_crop;"),
        (lambda root: (root / "train/1_crop.png").unlink(), "train", r"1 of 3 solutions .* have no image .*: 1_crop;"),
    ],
)
def test_bad_nucleus_folders(nucleus_root: Path, damage: Callable[[Path], object], split: str, message: str) -> None:
    damage(nucleus_root)
    with pytest.raises(DataError, match=message):
        nucleus.read(nucleus_root, split)


def test_many_unpaired_images_are_counted(nucleus_root: Path) -> None:
    for number in range(10, 15):
        (nucleus_root / "train" / f"{number}_crop.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"5 of 8 images .*10_crop, 11_crop, 12_crop and 2 more; add"):
        nucleus.read(nucleus_root, "train")


@pytest.mark.parametrize(
    ("solution_HW", "message"),
    [
        (np.zeros((60, 100), np.uint8), r"solutions/0_crop\.png is all black"),
        (np.eye(60, 100, dtype=np.uint8) * 255, r"solutions/0_crop\.png encloses no nucleus"),
        (np.full((60, 100), 255, np.uint8), "encloses no nucleus"),
        (draw_cluster()[1].astype(np.uint16) * 257, "uint16 pixels; convert it to 8 bit"),
        (draw_cluster()[1][:50], r"solutions/0_crop\.png is 50 x 100 pixels .* its image 60 x 100"),
        (draw_cluster()[1] > 0, r"solutions/0_crop\.png holds bool"),
        (np.random.default_rng(0).integers(0, 255, (60, 100, 3), np.uint8), r"solutions/0_crop\.png is a colour image"),
    ],
)
def test_bad_solutions(nucleus_root: Path, solution_HW: np.ndarray, message: str) -> None:
    iio.imwrite(nucleus_root / "train" / "solutions" / "0_crop.png", solution_HW)
    record = nucleus.read(nucleus_root, "train")[0]
    with pytest.raises(DataError, match=message):
        nucleus.load(record)


def test_labels_records_and_samples(labels_root: Path) -> None:
    assert detect_format(labels_root).NAME == "labels"
    records = labels.read(labels_root, "train")
    assert [(record.id, record.group) for record in records] == [(f"im{i}", f"im{i}") for i in range(3)]
    assert labels.read(labels_root / "train", "test") == records
    sample = labels.load(records[2])
    assert sample.image_HWC.shape == (20, 30, 1)
    assert sample.image_HWC.dtype == np.uint16
    assert sample.labels_HW.dtype == np.int32
    assert np.all(sample.labels_HW == 1)  # 2 in the file


def test_ids_of_any_size_are_numbered_anew(labels_root: Path) -> None:
    ids_HW = np.zeros((20, 30), np.int32)
    ids_HW[2:5], ids_HW[8:11], ids_HW[14:17] = 2_000_000_001, 2_000_000_002, -2_000_000_000
    tifffile.imwrite(labels_root / "train" / "masks" / "im1.tif", ids_HW)
    labels_HW = labels.load(labels.read(labels_root, "train")[1]).labels_HW
    assert [labels_HW[row, 0] for row in (0, 3, 9, 15)] == [0, 1, 2, -1]


def test_ignored_pixels_stay_negative_and_suffixes_may_differ(labels_root: Path) -> None:
    mask = labels_root / "train" / "masks" / "im1.tif"
    mask.unlink()
    ids_HW = np.zeros((20, 30), np.int32)
    ids_HW[5:9] = -1
    tifffile.imwrite(mask.with_suffix(".tiff"), ids_HW)
    np.testing.assert_array_equal(labels.load(labels.read(labels_root, "train")[1]).labels_HW, ids_HW)
    tifffile.imwrite(mask, ids_HW)
    with pytest.raises(DataError, match="same stem"):
        labels.read(labels_root, "train")


def test_groups_table(labels_root: Path) -> None:
    table = labels_root / "train" / "groups.csv"
    table.write_text("id,group\nim0,A\nim1,A\nim2,B\nelsewhere,C\n")
    assert [record.group for record in labels.read(labels_root, "train")] == ["A", "A", "B"]
    for content, message in (
        ("id,group\nim0,A\n", r"groups\.csv has no group for im1, im2"),
        ("name,field\nim0,A\n", "line 2 lacks an id or a group"),
        ("id,group\nim0,A\nim0,B\n", "'im0' into both 'A' and 'B'"),
    ):
        table.write_text(content)
        with pytest.raises(DataError, match=message):
            labels.read(labels_root, "train")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((20, 30), np.float32), r"masks/im0\.tif holds float32"),
        (np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8), r"masks/im0\.tif is a colour image"),
        (np.zeros((20, 29), np.uint8), r"masks/im0\.tif is 20 x 29 pixels .* its image 20 x 30"),
    ],
)
def test_bad_label_images(labels_root: Path, pixels: np.ndarray, message: str) -> None:
    tifffile.imwrite(labels_root / "train" / "masks" / "im0.tif", pixels)
    with pytest.raises(DataError, match=message):
        labels.load(labels.read(labels_root, "train")[0])


def test_unpaired_and_missing_label_folders(labels_root: Path) -> None:
    (labels_root / "train" / "masks" / "im0.tif").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images .* have no label image .*: im0;"):
        labels.read(labels_root, "train")
    with pytest.raises(DataError, match=r"test does not exist"):
        labels.read(labels_root, "test")


def test_detection_names_what_it_looked_for_and_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone does not exist"):
        detect_format(tmp_path / "gone")
    layouts = r"nucleus: train/X\.png .*; labels: train/images.*; cellpose: train/X\.tif .*; dsb: train/ID/images"
    with pytest.raises(DataError, match=rf"it holds nothing; arrange .* {layouts}"):
        detect_format(tmp_path)
    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="it holds a, b, c and 2 more"):
        detect_format(tmp_path)
    for name in ("solutions", "images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"formats nucleus and labels; say which one with data\.format"):
        detect_format(tmp_path)


def test_formats_are_found_by_name() -> None:
    assert get_format("nucleus").NAME == "nucleus"
    assert get_format("labels").NAME == "labels"
    with pytest.raises(ConfigError, match=r"no folder layout 'coco'; choose data\.format from auto, nucleus, labels"):
        get_format("coco")
    folders = set(get_args(FormatName)) - {"auto", synthetic.NAME}
    assert {get_format(name).NAME for name in folders} == folders


needs_data = pytest.mark.skipif("NUCISEG_DATA" not in os.environ, reason="NUCISEG_DATA names no data folder")


@needs_data
@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", {2: 455, 3: 78, 4: 19, 5: 2, 6: 1}), ("test", {2: 16, 3: 20, 4: 5, 5: 1})],
)
def test_every_shipped_cluster_holds_its_nuclei(split: str, expected: dict[int, int]) -> None:
    records = nucleus.read(Path(os.environ["NUCISEG_DATA"]) / "nucleus", split)
    assert len({record.group for record in records}) == len(records)  # no two images are the same
    assert Counter(int(nucleus.load(record).labels_HW.max()) for record in records) == expected


@needs_data
def test_shipped_label_images_are_read() -> None:
    root = Path(os.environ["NUCISEG_DATA"]) / "dsb2018"
    assert detect_format(root).NAME == "labels"
    records = labels.read(root, "test")
    assert len(records) == 50
    assert all(labels.load(record).labels_HW.max() > 0 for record in records[:5])
