"""Cellpose's layout: which file is an image, which its labels, and which neither."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nuciseg.config import DataConfig
from nuciseg.data.formats import cellpose, detect_format, get_format
from nuciseg.data.formats.folders import LeftOut
from nuciseg.engine.datasets import open_samples
from nuciseg.errors import DataError
from nuciseg.exploring.reading import open_data


def write_pair(folder: Path, image: str, masks: str, value: int = 100) -> None:
    """An image of its own `value` with two nuclei that touch, numbered 3 and 7."""
    folder.mkdir(parents=True, exist_ok=True)
    labels_HW = np.zeros((20, 30), np.uint16)
    labels_HW[5:15, 5:12], labels_HW[5:15, 12:25] = 3, 7
    write(folder / image, np.full((20, 30), value, np.uint8))
    write(folder / masks, labels_HW)


def write(path: Path, pixels: np.ndarray) -> None:
    if path.suffix == ".png":
        iio.imwrite(path, pixels)
    else:
        tifffile.imwrite(path, pixels)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One pair of each spelling in `train`, one pair in `test`."""
    root = tmp_path / "data"
    write_pair(root / "train", "a.tif", "a_masks.tif", 1)
    write_pair(root / "train", "b.png", "b_cp_masks.png", 2)
    write_pair(root / "train", "c.tiff", "c_masks.png", 3)
    write_pair(root / "train", "d_img.png", "d_masks.png", 4)
    write_pair(root / "train", "e_img.tif", "e_img_cp_masks.tif", 5)
    write_pair(root / "test", "z.tif", "z_masks.tif", 6)
    return root


def test_pairs_are_found_in_both_parts_and_in_a_folder_of_pairs(root: Path) -> None:
    assert detect_format(root) is get_format("cellpose")
    records = cellpose.read(root, "train")
    assert [(record.id, record.group) for record in records] == [(id, id) for id in "abcde"]
    assert [record.label_paths[0].name for record in records][1::2] == ["b_cp_masks.png", "d_masks.png"]
    assert [record.id for record in cellpose.read(root, "test")] == ["z"]
    assert detect_format(root / "train").NAME == "cellpose"
    assert cellpose.read(root / "train", "test") == records


def test_nuclei_are_numbered_from_1_and_negative_pixels_ignored(root: Path) -> None:
    sample = cellpose.load(cellpose.read(root, "train")[0])
    assert (sample.image_HWC.shape, sample.image_HWC.dtype) == ((20, 30, 1), np.uint8)
    assert sample.labels_HW.dtype == np.int32
    assert [sample.labels_HW[10, column] for column in (0, 8, 20)] == [0, 1, 2]
    write(root / "train" / "a_masks.tif", np.full((20, 30), -5, np.int32))
    assert np.all(cellpose.load(cellpose.read(root, "train")[0]).labels_HW == -1)


def test_what_cellpose_writes_besides_is_passed_over(root: Path) -> None:
    records = cellpose.read(root, "train")
    colours = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    for name in ("a_flows.tif", "a_flows_cp_masks.tif", "a_dP_cp_masks.tif", "b_outlines_cp_masks.png"):
        write(root / "train" / name, colours)
    for name in ("b_cp_output.png", "b_cp_output_cp_masks.png", "c_cellprob.tif", "a_flows_2.tif"):
        write(root / "train" / name, colours)
    np.save(root / "train" / "a_seg.npy", colours)
    (root / "train" / "a_rois.zip").write_bytes(b"")
    assert cellpose.read(root, "train") == records


def test_pictures_of_results_alone_are_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "a_outlines_cp_masks.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(
        DataError, match=r"no known layout, it holds a_outlines_cp_masks\.png; .*cellpose: train/X\.tif"
    ):
        detect_format(tmp_path)


def test_two_label_images_of_one_image_are_refused(root: Path) -> None:
    write(root / "train" / "a_cp_masks.tif", np.zeros((20, 30), np.uint8))
    with pytest.raises(DataError, match=r"a_masks\.tif and a_cp_masks\.tif have the same stem 'a'; keep one"):
        cellpose.read(root, "train")


def test_files_without_partner_are_refused_or_noted(root: Path) -> None:
    (root / "train" / "a_masks.tif").unlink()
    (root / "train" / "b.png").unlink()
    with pytest.raises(
        DataError, match=r"1 of 4 images in \S+train have no _masks file of the same name in \S+: a; add"
    ):
        cellpose.read(root, "train")
    left_out: list[LeftOut] = []
    assert [record.id for record in cellpose.read(root, "train", left_out)] == ["c", "d", "e"]
    assert [each.path.name for each in left_out] == ["a.tif", "b_cp_masks.png"]
    found = open_data(DataConfig(root=root, cache_dir=root.parent / "cache"))
    assert found.format_name == "cellpose"
    assert [(part.split, len(part)) for part in found.parts] == [("train", 3), ("test", 1)]
    assert len(found.broken) == 2


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        (
            "a_masks.tif",
            np.zeros((20, 29), np.uint8),
            r"a_masks\.tif is 20 x 29 pixels .* its image 20 x 30; make both",
        ),
        ("a_masks.tif", np.zeros((20, 30), np.float32), r"a_masks\.tif holds float32 pixels where labels are needed"),
        ("a.tif", np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8), r"a\.tif is a colour image"),
    ],
)
def test_bad_files(root: Path, name: str, pixels: np.ndarray, message: str) -> None:
    write(root / "train" / name, pixels)
    with pytest.raises(DataError, match=message):
        cellpose.load(cellpose.read(root, "train")[0])


def test_a_part_that_is_not_there_or_empty(root: Path) -> None:
    with pytest.raises(DataError, match=r"folder \S+/val does not exist"):
        cellpose.read(root, "val")
    for path in (root / "test").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"test holds no images \(\.tif, \.tiff, \.png\)"):
        cellpose.read(root, "test")


def test_groups_are_what_the_table_says_else_equal_files(root: Path) -> None:
    (root / "train" / "d_img.png").write_bytes((root / "train" / "b.png").read_bytes())
    assert [record.group for record in cellpose.read(root, "train")] == ["a", "b", "c", "b", "e"]
    (root / "train" / "groups.csv").write_text("id,group\na,F\nb,F\nc,F\nd,G\ne,G\n")
    assert [record.group for record in cellpose.read(root, "train")] == ["F", "F", "F", "G", "G"]


def test_training_opens_it(root: Path) -> None:
    config = DataConfig(root=root, cache_dir=root.parent / "cache")
    samples = open_samples(config, "train")
    assert samples.ids == tuple("abcde")
    assert all(sample.labels_HW.max() == 2 for sample in samples)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.sets(st.text("abm_-1 .", min_size=1, max_size=6).filter(lambda name: name.strip(" .")), min_size=1),
    ending=st.sampled_from(["_masks", "_cp_masks"]),
)
def test_any_name_finds_its_own_labels(tmp_path: Path, names: set[str], ending: str) -> None:
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    visible = {name for name in names if not name.startswith(".")}
    for name in names:
        (folder / f"{name}.png").touch()
        (folder / f"{name}{ending}.png").touch()
    if visible:
        records = cellpose.read(folder, "train")
        assert {record.id for record in records} == visible
        assert all(record.label_paths[0].name == f"{record.id}{ending}.png" for record in records)
