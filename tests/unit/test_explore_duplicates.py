"""Images that show the same are found, turned and changed ones too; groups and pairs that would leak are named."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from nuciseg.config import DataConfig
from nuciseg.data.formats import nucleus
from nuciseg.data.splits import split_records
from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder, write_nucleus_folder
from nuciseg.exploring.duplicates import (
    Leaks,
    Pair,
    find_leaks,
    find_near_duplicates,
    find_shared_parts,
    small_picture,
    turned,
)
from nuciseg.exploring.overlaps import find_overlaps, window_marks
from nuciseg.exploring.reading import open_data
from nuciseg.images import read_image, read_labels, write_labels_tiff, write_png

DRAWING = SyntheticConfig(num_train=8, num_test=4, mean_diameter_px=30.0, nuclei_per_cluster=(2, 3), seed=5)


@pytest.fixture
def clusters(tmp_path: Path) -> Path:
    write_nucleus_folder(DRAWING, tmp_path / "clusters")
    return tmp_path / "clusters"


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    write_labels_folder(DRAWING, tmp_path / "fields", 128, 160)
    return tmp_path / "fields"


def found(root: Path, split_seed: int = 0) -> tuple[list[Pair], Leaks]:
    data = open_data(DataConfig(root=root))
    pictures = [small_picture(sample.image_HWC[..., 0]) for part in data.parts for _, sample in part]
    pairs = find_near_duplicates(data, pictures)
    marks = [window_marks(sample.image_HWC[..., 0]) for part in data.parts for _, sample in part]
    pairs += find_shared_parts(data, marks, pairs)
    return pairs, find_leaks(data, pairs, 0.25, split_seed)


def files(pair: Pair) -> set[str]:
    return {pair.first.file, pair.second.file}


def test_different_images_are_no_duplicates(clusters: Path, fields: Path) -> None:
    for root in (clusters, fields):
        assert found(root) == ([], Leaks((), (), ()))


def test_a_changed_copy_in_the_other_split_leaks(clusters: Path) -> None:
    image_HW = read_image(clusters / "train" / "drawn_00003.png").astype(float)
    inside = (image_HW > 0) & (image_HW < 255)
    noise = np.random.default_rng(0).normal(0, 2, image_HW.shape)
    image_HW = np.where(inside, np.clip(1.2 * image_HW + noise, 1, 254), image_HW)
    solution_HW = read_image(clusters / "train" / "solutions" / "drawn_00003.png")
    write_png(clusters / "test" / "copy.png", np.rot90(image_HW).astype(np.uint8))
    write_png(clusters / "test" / "solutions" / "copy.png", np.rot90(solution_HW).astype(np.uint8))
    (pair,), leaks = found(clusters)
    assert files(pair) == {"train/drawn_00003.png", "test/copy.png"}
    assert pair.turned
    assert pair.crosses_splits
    assert leaks == Leaks((), (pair,), ())


def test_a_shifted_crop_of_a_field(fields: Path) -> None:
    for part, read, write in (("images", read_image, write_png), ("masks", read_labels, write_labels_tiff)):
        suffix = "png" if part == "images" else "tif"
        pixels_HW = read(fields / "train" / part / f"drawn_00002.{suffix}")
        write(fields / "train" / part / f"crop.{suffix}", np.ascontiguousarray(pixels_HW[5:, 7:]))
    (pair,), _ = found(fields)
    assert files(pair) == {"train/images/drawn_00002.png", "train/images/crop.png"}
    assert not pair.turned
    assert not pair.same_group


def test_pairs_that_the_split_divides(clusters: Path) -> None:
    for path in sorted((clusters / "train").glob("*.png")):
        image_HW = read_image(path)
        brighter_HW = np.where((image_HW > 0) & (image_HW < 254), image_HW + 1, image_HW).astype(np.uint8)
        write_png(path.with_name(f"{path.stem}_copy.png"), brighter_HW)
        solution_HW = read_image(path.parent / "solutions" / path.name)
        write_png(path.parent / "solutions" / f"{path.stem}_copy.png", solution_HW.astype(np.uint8))
    pairs, leaks = found(clusters, split_seed=1)
    assert len(pairs) == 8
    held_out = set(split_records(nucleus.read(clusters, "train"), 0.25, 1).validation_ids)
    divided = {pair.first.id for pair in pairs if (pair.first.id in held_out) != (pair.second.id in held_out)}
    assert divided
    assert {pair.first.id for pair in leaks.train_validation} == divided


def test_equal_files_share_a_group_and_are_never_divided(clusters: Path) -> None:
    for folder in (clusters / "train", clusters / "train" / "solutions"):
        (folder / "zz_copy.png").write_bytes((folder / "drawn_00001.png").read_bytes())
    (pair,), leaks = found(clusters)
    assert pair.same_group
    assert pair.likeness == pytest.approx(1, abs=1e-3)
    assert leaks.train_validation == ()


def test_groups_of_both_splits(fields: Path) -> None:
    for split, groups in (("train", "AABBCCDD"), ("test", "DEFG")):
        rows = [f"drawn_{number:05d},{group}" for number, group in enumerate(groups)]
        (fields / split / "groups.csv").write_text("\n".join(["id,group", *rows]) + "\n")
    assert found(fields)[1].groups == ("D",)


def test_equal_names_in_both_splits_are_no_groups(fields: Path) -> None:
    assert {path.name for path in (fields / "test" / "images").iterdir()} <= {
        path.name for path in (fields / "train" / "images").iterdir()
    }
    assert found(fields)[1].groups == ()


def test_the_eight_ways_to_lay_a_picture_are_different() -> None:
    picture = np.arange(12).reshape(3, 4)
    assert len({turned(picture, way).tobytes() + bytes(turned(picture, way).shape) for way in range(8)}) == 8
    np.testing.assert_array_equal(turned(picture, 0), picture)


def test_flat_images_are_not_alike() -> None:
    assert not small_picture(np.full((20, 30), 7, np.uint8)).any()
    assert not small_picture(np.zeros((20, 30), np.uint16)).any()
    rich = cv2.resize(np.random.default_rng(0).integers(1, 254, (5, 5), dtype=np.uint8), (40, 40))
    assert np.linalg.norm(small_picture(rich)) == pytest.approx(1, abs=1e-5)


def test_crops_of_one_field_that_share_a_corner(fields: Path) -> None:
    for split, window in (("train", np.s_[:80, :90]), ("test", np.s_[50:, 60:])):
        for part, read, write in (("images", read_image, write_png), ("masks", read_labels, write_labels_tiff)):
            suffix = "png" if part == "images" else "tif"
            pixels_HW = read(fields / "train" / part / f"drawn_00002.{suffix}")
            write(fields / split / part / f"part.{suffix}", np.ascontiguousarray(pixels_HW[window]))
    (fields / "train" / "images" / "drawn_00002.png").unlink()
    (fields / "train" / "masks" / "drawn_00002.tif").unlink()
    (pair,), leaks = found(fields)
    assert files(pair) == {"train/images/part.png", "test/images/part.png"}
    assert pair.partly
    assert 0 < pair.likeness < 0.5
    assert leaks.train_test == (pair,)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_shared_window_is_found_wherever_it_lies(dtype: type) -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(1, np.iinfo(dtype).max, (2, 60, 70), dtype)
    assert find_overlaps([window_marks(one), window_marks(other)]) == {}
    other[31:55, 3:27] = one[2:26, 40:64]
    assert list(find_overlaps([window_marks(one), window_marks(other)])) == [(0, 1)]


def test_flat_and_small_images_share_nothing() -> None:
    assert window_marks(np.full((40, 40), 9, np.uint8)).size == 0
    assert window_marks(np.arange(21, dtype=np.uint8).reshape(3, 7)).size == 0
    assert find_overlaps([]) == {}
