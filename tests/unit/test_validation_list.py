"""Validation images that a file names: those and no others, whole groups, and what is said about a bad list."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nuciseg.config import Config, DataConfig, add_config_flags, config_from_args, load_config
from nuciseg.data.splits import listed_records
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.engine.checkpoint import load_checkpoint, save_checkpoint
from nuciseg.engine.datasets import divide, open_split_samples
from nuciseg.engine.evaluation import evaluate_checkpoint
from nuciseg.errors import CheckpointError, ConfigError, DataError
from nuciseg.reporting.shipping import without_machine
from nuciseg.types import Record


def record(id: str, group: str | None = None) -> Record:
    return Record(id, None, (), group or id)


def write_list(folder: Path, *lines: str) -> Path:
    path = folder / "held out.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.lists(st.integers(0, 9), min_size=2, max_size=40), data=st.data())
def test_exactly_the_named_images_are_held_out_or_the_list_is_refused(
    tmp_path: Path, groups: list[int], data: st.DataObject
) -> None:
    records = [record(f"image{i:03}", f"group{group}") for i, group in enumerate(groups)]
    ids = [each.id for each in records]
    chosen = data.draw(st.lists(st.sampled_from(ids), min_size=1))
    path = write_list(tmp_path, *chosen)
    held_out = {each.group for each in records if each.id in chosen}
    if set(chosen) == set(ids) or any(each.group in held_out and each.id not in chosen for each in records):
        with pytest.raises(DataError):
            listed_records(records, path, 0)
        return
    split = listed_records(data.draw(st.permutations(records)), path, 0)
    assert split.validation_ids == tuple(sorted(set(chosen)))
    assert split.train_ids == tuple(sorted(set(ids) - set(chosen)))


def test_blank_lines_a_byte_order_mark_and_windows_ends_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\r\n  a b \r\n\xc3\xa4")
    split = listed_records([record(id) for id in ("a", "a b", "ä", "c")], path, 0)
    assert split.train_ids == ("c",)


def test_it_counts_instead_of_the_fraction_and_the_seed(tmp_path: Path) -> None:
    records = [record(f"image{i}") for i in range(10)]
    path = write_list(tmp_path, "image3")
    config = Config().replaced({"data.validation_list": str(path), "data.validation_fraction": 0.9}).data
    splits = [divide(records, config.model_copy(update={"split_seed": seed})) for seed in range(3)]
    assert [split.validation_ids for split in splits] == [("image3",)] * 3
    assert len({split.hash for split in splits}) == 1


GROUPED = [record("a", "F"), record("b", "F"), record("c", "G"), record("d", "G"), record("e")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"held out\.txt names no image; write the id"),
        (["", "  "], r"held out\.txt names no image"),
        (
            ["e", "x", "y.png"],
            r"held out\.txt names 2 of 3 images that there are not: x, y\.png; .* a, b, c and 2 more",
        ),
        (list("abcde"), r"held out\.txt names all 5 images, so none is left to train on"),
        (
            ["a", "e"],
            r"held out\.txt names a but not b of the same 1 group\(s\), .*; name all images of a group or none",
        ),
        (["a", "d"], r"names a, d but not b, c of the same 2 group\(s\)"),
    ],
)
def test_a_bad_list_is_refused_in_one_sentence(tmp_path: Path, lines: Sequence[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        listed_records(GROUPED, write_list(tmp_path, *lines), 0)


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt cannot be read \(No such file or directory\); check data\.valid"):
        listed_records(GROUPED, tmp_path / "gone.txt", 0)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary cannot be read \(not a text file\)"):
        listed_records(GROUPED, tmp_path / "binary", 0)
    with pytest.raises(DataError, match="'e' occurs twice"):
        listed_records([*GROUPED, record("e")], write_list(tmp_path, "e"), 0)


def test_a_list_and_folds_exclude_each_other() -> None:
    said = r"data\.validation_list held\.txt and data\.num_folds 3 both say which images are held out: set one of them"
    with pytest.raises(ConfigError, match=said):
        load_config(overrides={"data": {"validation_list": "held.txt", "num_folds": 3}})


def test_its_path_is_written_whole() -> None:
    """Workers and resumed runs may have another working folder."""
    parser = argparse.ArgumentParser()
    source = add_config_flags(parser)
    words = ["--data.validation_list", "lists/held.txt"]
    config = config_from_args(source, parser.parse_args(words))
    assert config.data.validation_list == Path("lists/held.txt").resolve()


def test_weights_that_are_shipped_keep_its_name_alone(tmp_path: Path) -> None:
    config = Config().replaced({"data.validation_list": str(tmp_path / "held.txt")})
    assert without_machine(config, "nucleus").data.validation_list == Path("held.txt")


# ---------------------------------------------------------------------------------------------------- on real files
@pytest.fixture
def drawn(tmp_path: Path) -> DataConfig:
    """Four drawn training clusters, of which the last two are validation."""
    root = tmp_path / "drawn"
    write_nucleus_folder(SyntheticConfig(num_train=4, num_test=4, mean_diameter_px=16.0), root)
    return DataConfig(root=root / "train", validation_list=write_list(tmp_path, "drawn_00002", "drawn_00003"))


@pytest.fixture
def listed_checkpoint(tiny_checkpoint: Path, drawn: DataConfig, tmp_path: Path) -> Path:
    """The checkpoint of a run on `drawn`."""
    loaded = load_checkpoint(tiny_checkpoint)
    split = open_split_samples(drawn)[1]
    assert split.validation_ids == ("drawn_00002", "drawn_00003")
    config = loaded.config.model_copy(update={"data": drawn})
    save_checkpoint(replace(loaded, config=config, split_hash=split.hash), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_named_images_are_the_validation_that_evaluate_scores(listed_checkpoint: Path, tmp_path: Path) -> None:
    device = torch.device("cpu")
    result = evaluate_checkpoint(listed_checkpoint, None, "validation", tmp_path / "out", device=device)
    assert result.scores.images == 2
    write_list(tmp_path, "drawn_00002")
    with pytest.raises(CheckpointError, match=r"its validation images are not known"):
        evaluate_checkpoint(listed_checkpoint, None, "validation", tmp_path / "out", device=device)


def test_other_images_are_a_test_also_where_the_list_does_not_fit_them(
    listed_checkpoint: Path, drawn: DataConfig, tmp_path: Path
) -> None:
    assert drawn.root is not None
    assert drawn.validation_list is not None
    others = drawn.root.parent / "test"
    shutil.rmtree(drawn.root)  # so that contents cannot be compared, only the hash of the names
    (others / "drawn_00003.png").rename(others / "other.png")
    (others / "solutions" / "drawn_00003.png").rename(others / "solutions" / "other.png")
    device = torch.device("cpu")
    for number in range(2):
        out = tmp_path / f"out{number}"
        result = evaluate_checkpoint(listed_checkpoint, DataConfig(root=others), "test", out, device=device)
        assert result.scores.images == 4
        drawn.validation_list.unlink(missing_ok=True)
