"""The same fields in other layouts: `explore`, `cut`, training and `evaluate` take them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_runs import run, small_config

from nuciseg import cut, evaluate, explore
from nuciseg.cli import run_verb
from nuciseg.data.formats import nucleus
from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder
from nuciseg.images import read_labels, write_labels_tiff, write_png

DRAWING = SyntheticConfig(num_train=3, num_test=1, mean_diameter_px=24.0)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn training fields and one for the test, in the layout `labels`."""
    root = tmp_path_factory.mktemp("fields")
    write_labels_folder(DRAWING, root, 96, 96)
    return root


def lay_out_for_cellpose(split: Path, image: Path, labels_HW: np.ndarray) -> None:
    split.mkdir(parents=True, exist_ok=True)
    shutil.copy(image, split / image.name)
    write_labels_tiff(split / f"{image.stem}_masks.tif", labels_HW)


def lay_out_for_the_bowl(split: Path, image: Path, labels_HW: np.ndarray) -> None:
    place = split.with_name(f"stage1_{split.name}") / image.stem
    (place / "images").mkdir(parents=True)
    shutil.copy(image, place / "images" / image.name)
    for label in range(1, labels_HW.max() + 1):
        write_png(place / "masks" / f"{label:03}.png", (labels_HW == label).astype(np.uint8) * 255)


def count_nuclei(fields: Path) -> tuple[int, ...]:
    """Of train and of test."""
    return tuple(
        sum(int(read_labels(path).max()) for path in (fields / split / "masks").iterdir())
        for split in ("train", "test")
    )


def call(main: Callable[[list[str]], None], *words: str | Path) -> int:
    """The exit code of a verb, in this process: importing torch once more takes seconds."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


@pytest.mark.parametrize(("name", "lay_out"), [("cellpose", lay_out_for_cellpose), ("dsb", lay_out_for_the_bowl)])
def test_all_commands_take_it(
    fields: Path, tmp_path: Path, name: str, lay_out: Callable[[Path, Path, np.ndarray], None]
) -> None:
    root = tmp_path / name
    for image in sorted(fields.glob("*/images/*.png")):
        split = image.parents[1]
        lay_out(root / split.name, image, read_labels(split / "masks" / f"{image.stem}.tif"))

    assert call(explore.main, root, "--out", tmp_path / "page.html", "--json", tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["format"] == name
    assert (found["counts"]["train"]["images"], found["counts"]["test"]["images"]) == (3, 1)
    assert (found["counts"]["train"]["nuclei"], found["counts"]["test"]["nuclei"]) == count_nuclei(fields)

    assert call(cut.main, root, "--out", tmp_path / "clusters", "--keep-edge", "--min-nuclei", 1) == 0
    assert all(nucleus.read(tmp_path / "clusters", split) for split in ("train", "test"))

    chosen = tmp_path / "held_out.txt"
    chosen.write_text("drawn_00001\n")
    flat = {"data.root": str(root), "data.validation_list": str(chosen), "train.epochs": 1, "augment.join": 0.0}
    flat |= {"train.calibrate": False}
    assert len(run(small_config(**flat), tmp_path / "run").history) == 1
    for split, num_images in (("test", 1), ("train", 2)):
        out = tmp_path / split
        words = ["--checkpoint", tmp_path / "run", "--split", split, "--out", out, "--tracking.kind", "none"]
        assert call(evaluate.main, *words) == 0
        assert json.loads((out / "scores.json").read_text())["images"] == num_images
