"""Splits: whole groups, the wished share, the same for any order of the records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuciseg.config import Config
from nuciseg.data.splits import Split, fold_records, split_records
from nuciseg.data.synthetic import SyntheticConfig, cluster_seed, draw_cluster, write_nucleus_pair
from nuciseg.engine.datasets import open_samples, open_split_samples
from nuciseg.errors import ConfigError, DataError, ResourceError
from nuciseg.types import Record


def record(id: str, group: str | None = None) -> Record:
    return Record(id, None, (), group or id)


GROUPED = st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda groups: len(set(groups)) > 1)


@given(groups=GROUPED, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**32), data=st.data())
def test_no_group_straddles_and_order_does_not_matter(
    groups: list[int], fraction: float, seed: int, data: st.DataObject
) -> None:
    records = [record(f"image{i:03}", f"group{group}") for i, group in enumerate(groups)]
    split = split_records(records, fraction, seed)
    assert sorted(split.train + split.validation) == list(range(len(records)))
    assert split.train
    assert split.validation
    assert {records[i].group for i in split.train}.isdisjoint(records[i].group for i in split.validation)
    assert [records[i].id for i in split.validation] == list(split.validation_ids)
    assert [records[i].id for i in split.train] == list(split.train_ids)

    shuffled = data.draw(st.permutations(records))
    again = split_records(shuffled, fraction, seed)
    assert (again.train_ids, again.validation_ids, again.hash) == (split.train_ids, split.validation_ids, split.hash)
    assert [shuffled[i].id for i in again.validation] == list(again.validation_ids)


@given(groups=GROUPED, fraction=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_share_misses_the_wish_by_at_most_half_the_largest_group(groups: list[int], fraction: float, seed: int) -> None:
    records = [record(f"image{i:03}", f"group{group}") for i, group in enumerate(groups)]
    wish = min(max(round(fraction * len(records)), 1), len(records) - 1)
    sizes = sorted(groups.count(group) for group in set(groups))
    # Where a side would be empty, one smallest group is moved.
    allowed = max(sizes[-1] / 2, sizes[0])
    assert abs(len(split_records(records, fraction, seed).validation) - wish) <= allowed


def test_share_is_exact_without_groups_and_depends_on_the_seed() -> None:
    records = [record(f"image{i}") for i in range(100)]
    splits = [split_records(records, 0.15, seed) for seed in range(5)]
    assert [len(split.validation) for split in splits] == [15] * 5
    assert len({split.hash for split in splits}) == 5
    assert split_records(records, 0.15, 0) == splits[0]
    assert len(split_records(records[:2], 0.01, 0).validation) == 1
    assert len(split_records(records[:2], 0.99, 0).train) == 1


def test_hash_names_the_sides_and_not_the_seed() -> None:
    split = Split((0,), (1,), ("a",), ("b",), seed=1)
    assert split.hash == Split((1,), (0,), ("a",), ("b",), seed=2).hash
    assert split.hash != Split((1,), (0,), ("b",), ("a",), seed=1).hash
    assert len(split.hash) == 16
    int(split.hash, 16)


def test_written_file_holds_everything(tmp_path: Path) -> None:
    split = split_records([record(f"image{i}") for i in range(10)], 0.3, seed=7)
    split.write(tmp_path / "run" / "split.json")
    content = json.loads((tmp_path / "run" / "split.json").read_text())
    assert content == {
        "hash": split.hash,
        "seed": 7,
        "train": list(split.train_ids),
        "validation": list(split.validation_ids),
    }
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        split.write(tmp_path / "file" / "split.json")


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(DataError, match=r"3 images in 1 group"):
        split_records([record(f"image{i}", "field") for i in range(3)], 0.5, 0)
    with pytest.raises(DataError, match="0 images"):
        split_records([], 0.5, 0)
    with pytest.raises(DataError, match="'a' occurs twice"):
        split_records([record("a"), record("b"), record("a")], 0.5, 0)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="validation_fraction"):
            split_records([record("a"), record("b")], fraction, 0)


@given(groups=GROUPED, num_folds=st.integers(2, 6), seed=st.integers(0, 99), data=st.data())
def test_folds_hold_each_image_out_once_and_no_group_straddles(
    groups: list[int], num_folds: int, seed: int, data: st.DataObject
) -> None:
    records = [record(f"image{i:03}", f"group{group}") for i, group in enumerate(groups)]
    if len(set(groups)) < num_folds:
        with pytest.raises(DataError, match=r"data\.num_folds"):
            fold_records(records, num_folds, 0, seed)
        return
    folds = [fold_records(records, num_folds, fold, seed) for fold in range(num_folds)]
    assert sorted(i for fold in folds for i in fold.validation) == list(range(len(records)))
    sizes = [len(fold.validation) for fold in folds]
    assert max(sizes) - min(sizes) <= max(groups.count(group) for group in groups)
    for fold in folds:
        assert sorted(fold.train + fold.validation) == list(range(len(records)))
        assert {records[i].group for i in fold.train}.isdisjoint(records[i].group for i in fold.validation)
    again = fold_records(data.draw(st.permutations(records)), num_folds, 1, seed)
    assert again.hash == folds[1].hash


def test_folds_depend_on_the_seed_and_must_exist() -> None:
    records = [record(f"image{i}") for i in range(20)]
    assert len({fold_records(records, 5, 0, seed).hash for seed in range(5)}) == 5
    with pytest.raises(ConfigError, match=r"data\.fold is 5, but data\.num_folds is 5; choose 0 to 4"):
        fold_records(records, 5, 5, 0)


def test_pooled_test_images_are_divided_with_the_others_and_test_nothing() -> None:
    config = Config().replaced({"data.synthetic.num_train": 12, "data.synthetic.num_test": 8, "data.num_folds": 5}).data
    assert len(open_split_samples(config)[0]) == 12
    pooled = config.model_copy(update={"pool_test": True})
    samples, split = open_split_samples(pooled)
    assert len(samples) == 20
    assert len(split.validation) == 4
    assert set(open_samples(config, "test").ids) < set(samples.ids)
    with pytest.raises(DataError, match=r"data\.pool_test made the test images training"):
        open_samples(pooled, "test")


def test_the_same_image_in_both_pooled_parts_is_on_one_side(tmp_path: Path) -> None:
    drawing = SyntheticConfig(num_train=6, num_test=6)
    for number in range(6):
        sample = draw_cluster(drawing, cluster_seed(drawing, "train", number))
        write_nucleus_pair(tmp_path / "train", f"a{number}", sample)
        write_nucleus_pair(tmp_path / "test", f"b{number}", sample)
    changes = {"data.root": str(tmp_path), "data.pool_test": True, "data.num_folds": 3}
    for fold in range(3):
        _, split = open_split_samples(Config().replaced({**changes, "data.fold": fold}).data)
        held_out = {id[1:] for id in split.validation_ids}
        assert len(split.validation_ids) == 2 * len(held_out) == 4
        assert held_out.isdisjoint(id[1:] for id in split.train_ids)
