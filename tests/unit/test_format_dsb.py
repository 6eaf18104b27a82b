"""The Data Science Bowl's layout: one mask file per nucleus, what overlaps, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nuciseg.config import Config, DataConfig
from nuciseg.data.cache import content_key
from nuciseg.data.formats import detect_format, dsb, get_format
from nuciseg.data.formats.folders import LeftOut, splits_there
from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder
from nuciseg.distributed.final import check_test_images, has_test_images
from nuciseg.engine.datasets import open_samples
from nuciseg.errors import DataError
from nuciseg.exploring.reading import open_data
from nuciseg.types import Record


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask_HW = np.zeros((20, 30), np.uint8)
    mask_HW[top:bottom, left:right] = 255
    return mask_HW


def write_image(folder: Path, id: str, masks: list[np.ndarray], value: int = 100) -> Path:
    """An image as the competition has it, RGBA with equal colours, and its masks `0.png`, `1.png`, ...; its folder."""
    place = folder / id
    for part in ("images", "masks"):
        (place / part).mkdir(parents=True, exist_ok=True)
    rgba_HWC = np.full((20, 30, 4), value, np.uint8)
    rgba_HWC[..., 3] = 255
    iio.imwrite(place / "images" / f"{id}.png", rgba_HWC)
    for number, mask_HW in enumerate(masks):
        iio.imwrite(place / "masks" / f"{number}.png", mask_HW)
    return place


def fill(folder: Path, *ids: str) -> None:
    for number, id in enumerate(ids):
        write_image(folder, id, [box(2, 2, 9, 9), box(2, 9, 9, 20)], 100 + number)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    fill(root / "stage1_train", "a", "b", "c")
    fill(root / "stage1_test", "z")
    return root


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder of the only image."""
    return write_image(tmp_path / "data", "a", [box(2, 2, 9, 9), box(2, 9, 9, 20)])


def load_only(place: Path) -> np.ndarray:
    return dsb.load(dsb.read(place.parent, "train")[0]).labels_HW


@pytest.mark.parametrize(
    ("train", "test"), [("train", "test"), ("stage1_train", "stage1_test"), ("train", "stage1_test")]
)
def test_folders_of_splits_by_either_name(tmp_path: Path, train: str, test: str) -> None:
    fill(tmp_path / train, "b", "a")
    fill(tmp_path / test, "z")
    assert detect_format(tmp_path) is get_format("dsb")
    assert splits_there(tmp_path, dsb.holds) == ("train", "test")
    assert [(record.id, record.group) for record in dsb.read(tmp_path, "train")] == [("a", "a"), ("b", "b")]
    assert [record.id for record in dsb.read(tmp_path, "test")] == ["z"]


def test_a_folder_of_images_serves_as_the_split_that_has_none(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    assert detect_format(tmp_path).NAME == "dsb"
    assert [record.id for record in dsb.read(tmp_path, "test")] == ["a", "b"]
    fill(tmp_path / "test", "z")
    assert splits_there(tmp_path, dsb.holds) == ("train", "test")
    assert [record.id for record in dsb.read(tmp_path, "train")] == ["a", "b"]
    assert [record.id for record in dsb.read(tmp_path, "test")] == ["z"]


def test_folders_of_label_images_are_not_taken_for_images(tmp_path: Path) -> None:
    """`ROOT/train/images` looks like `ROOT/ID/images`."""
    write_labels_folder(SyntheticConfig(num_train=2, num_test=1), tmp_path, 64, 64)
    (tmp_path / "train").rename(tmp_path / "val")
    assert detect_format(tmp_path).NAME == "labels"


def test_grey_in_four_channels_with_one_number_per_mask(root: Path) -> None:
    sample = dsb.load(dsb.read(root, "train")[1])
    assert (sample.image_HWC.shape, sample.image_HWC.dtype) == ((20, 30, 1), np.uint8)
    assert np.all(sample.image_HWC == 101)
    assert sample.labels_HW.dtype == np.int32
    assert [sample.labels_HW[5, column] for column in (0, 8, 9, 19, 20)] == [0, 1, 2, 2, 0]


def test_masks_of_one_bit_and_of_any_one_value(place: Path) -> None:
    eight = load_only(place)
    iio.imwrite(place / "masks" / "0.png", box(2, 2, 9, 9) > 0)
    iio.imwrite(place / "masks" / "1.png", (box(2, 9, 9, 20) > 0).astype(np.uint16))
    np.testing.assert_array_equal(load_only(place), eight)


def test_a_pixel_of_several_masks_belongs_to_the_smallest(place: Path) -> None:
    iio.imwrite(place / "masks" / "0.png", box(0, 0, 20, 30))
    iio.imwrite(place / "masks" / "1.png", box(4, 4, 10, 10))
    iio.imwrite(place / "masks" / "2.png", box(4, 8, 10, 14))
    labels_HW = load_only(place)
    assert [labels_HW[5, column] for column in (3, 4, 7, 8, 9, 10, 13, 14)] == [1, 2, 2, 3, 3, 3, 3, 1]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(masks=st.lists(hnp.arrays(bool, (4, 5)).filter(np.any), min_size=1, max_size=5))
def test_each_pixel_has_one_of_its_own_masks_and_no_nucleus_is_lost(tmp_path: Path, masks: list[np.ndarray]) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(len(masks))]
    iio.imwrite(tmp_path / "image.png", np.zeros((4, 5), np.uint8))
    for path, mask_HW in zip(paths, masks, strict=True):
        iio.imwrite(path, mask_HW.astype(np.uint8) * 255)
    record = Record("a", tmp_path / "image.png", tuple(paths), "a")
    # Said again for each pixel by itself: the smallest of its masks, of equal ones the last.
    sizes = [int(mask_HW.sum()) for mask_HW in masks]
    expected_HW = np.zeros((4, 5), np.int32)
    for place in np.ndindex(4, 5):
        own = [(sizes[number], -number) for number, mask_HW in enumerate(masks) if mask_HW[place]]
        expected_HW[place] = 1 - min(own)[1] if own else 0
    if lost := set(range(1, len(masks) + 1)) - set(expected_HW.ravel()):
        with pytest.raises(DataError, match=rf"/{min(lost) - 1}\.png is covered by other masks; remove it"):
            dsb.load(record)
    else:
        np.testing.assert_array_equal(dsb.load(record).labels_HW, expected_HW)


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("masks/1.png", box(0, 0, 0, 0), r"The mask \S+a/masks/1\.png is empty; mark its nucleus in 255 or remove"),
        ("masks/1.png", box(2, 2, 9, 9)[:19], r"a/masks/1\.png is 19 x 30 pixels .* its image 20 x 30; make both"),
        ("masks/1.png", box(2, 2, 9, 9), r"The mask \S+a/masks/0\.png is covered by other masks; remove it"),
        (
            "masks/1.png",
            box(2, 2, 9, 9) // 2 + box(5, 5, 9, 9) // 4,
            r"masks/1\.png holds 2 values beside 0 .* one file",
        ),
        ("masks/1.png", np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8), "is a colour image"),
        (
            "images/a.png",
            np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8),
            r"a/images/a\.png is a colour image where grey is needed; convert it to one grey channel",
        ),
    ],
)
def test_bad_files(place: Path, name: str, pixels: np.ndarray, message: str) -> None:
    iio.imwrite(place / name, pixels)
    with pytest.raises(DataError, match=message):
        load_only(place)


def test_a_mask_that_is_no_image(place: Path) -> None:
    (place / "masks" / "1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"masks/1\.png cannot be read as an image"):
        load_only(place)


def remove_masks(place: Path) -> None:
    for path in (place / "masks").iterdir():
        path.unlink()


@pytest.mark.parametrize("with_folder", [True, False])
def test_unlabelled_images_are_refused_or_noted(root: Path, with_folder: bool) -> None:
    train = root / "stage1_train"
    for id in ("a", "c"):
        remove_masks(train / id)
        if not with_folder:
            (train / id / "masks").rmdir()
    with pytest.raises(DataError, match=r"2 of 3 images in \S+stage1_train are unlabelled, .* ID/masks: a, c; add one"):
        dsb.read(root, "train")
    left_out: list[LeftOut] = []
    assert [record.id for record in dsb.read(root, "train", left_out)] == ["b"]
    assert [each.path for each in left_out] == [train / id / "images" / f"{id}.png" for id in ("a", "c")]
    found = open_data(DataConfig(root=root, cache_dir=root.parent / "cache"))
    assert [(part.split, len(part)) for part in found.parts] == [("train", 1), ("test", 1)]
    assert [broken.path.name for broken in found.broken if broken.path] == ["a.png", "c.png"]


def test_masks_without_image_are_refused_or_noted(root: Path) -> None:
    place = root / "stage1_train" / "b"
    (place / "images" / "b.png").rename(place / "images" / "other.png")
    with pytest.raises(DataError, match=r"1 of 3 folders in \S+ hold no image ID/images/ID\.png: b; add the images or"):
        dsb.read(root, "train")
    left_out: list[LeftOut] = []
    assert [record.id for record in dsb.read(root, "train", left_out)] == ["a", "c"]
    assert [each.path for each in left_out] == [place]


def test_foreign_files_and_folders_are_passed_over(root: Path) -> None:
    records = dsb.read(root, "train")
    train = root / "stage1_train"
    (train / "notes" / "more").mkdir(parents=True)
    (train / "labels.csv").write_text("ImageId,EncodedPixels\n")
    (train / "a" / "masks" / "._0.png").write_bytes(b"resource fork")
    (train / "a" / "masks" / "notes.txt").write_text("nothing")
    assert dsb.read(root, "train") == records


def test_a_part_that_is_not_there_or_empty(root: Path) -> None:
    with pytest.raises(DataError, match=r"folder \S+/val does not exist"):
        dsb.read(root, "val")
    (root / "test").mkdir()
    with pytest.raises(DataError, match=r"/test holds no images; arrange them as ID/images/ID\.png"):
        dsb.read(root, "test")


def test_groups_are_what_the_table_says_else_equal_files(root: Path) -> None:
    train = root / "stage1_train"
    (train / "c" / "images" / "c.png").write_bytes((train / "a" / "images" / "a.png").read_bytes())
    assert [record.group for record in dsb.read(root, "train")] == ["a", "b", "a"]
    (train / "groups.csv").write_text("id,group\na,F\nb,F\nc,G\n")
    assert [record.group for record in dsb.read(root, "train")] == ["F", "F", "G"]


def test_the_content_hash_covers_every_mask(root: Path) -> None:
    config = DataConfig(root=root, cache_dir=root.parent / "cache")
    before = open_samples(config, "train")
    assert before.ids == ("a", "b", "c")
    records = dsb.read(root, "train")
    for number in range(2):
        key = content_key(records, "dsb")
        iio.imwrite(records[2].label_paths[number], box(11, 2 + 5 * number, 15, 6 + 5 * number))
        assert content_key(records, "dsb") != key
    after = open_samples(config, "train")
    assert after.path != before.path
    assert after[2].labels_HW[12, 8] == 2


def test_test_images_that_came_without_masks_are_none_to_test_on(root: Path) -> None:
    """As the competition gave them out: a search of its folder then scores the winner on validation."""
    config = Config().replaced({"data.root": str(root), "target": {"kind": "depth"}, "model.depth": 2})
    check_test_images(config)
    assert has_test_images(config.data)
    write_image(root / "stage1_test", "y", [])
    with pytest.raises(DataError, match=r"1 of 2 images in \S+stage1_test are unlabelled"):
        check_test_images(config)
    shutil.rmtree(root / "stage1_test")
    write_image(root / "stage1_test", "y", [])
    check_test_images(config)
    assert not has_test_images(config.data)
