"""`explore`: broken data are reported and the rest is shown; no data is one sentence and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from nuciseg.cli import run_verb
from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder, write_nucleus_folder
from nuciseg.explore import main
from nuciseg.images import read_image, read_labels, write_labels_tiff, write_png

DRAWING = SyntheticConfig(num_train=6, num_test=2, mean_diameter_px=30.0, nuclei_per_cluster=(2, 2), seed=9)


@pytest.fixture
def clusters(tmp_path: Path) -> Path:
    write_nucleus_folder(DRAWING, tmp_path / "clusters")
    return tmp_path / "clusters"


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    write_labels_folder(DRAWING, tmp_path / "fields", 128, 128)
    return tmp_path / "fields"


def explore(*words: str | Path) -> int:
    """The exit code of the verb, in this process: importing torch once more takes seconds."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


def told(root: Path, tmp_path: Path) -> tuple[dict[str, Any], str]:
    """What is found in `root`: the JSON and the page."""
    assert explore(root, "--out", tmp_path / "page.html", "--json", tmp_path / "found.json") == 0
    return json.loads((tmp_path / "found.json").read_text()), (tmp_path / "page.html").read_text(encoding="utf-8")


def faults(found: dict[str, Any]) -> set[tuple[str, str]]:
    return {(fault["kind"], fault["file"]) for fault in found["faults"]["list"]}


def test_a_clean_data_set(clusters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, page = told(clusters, tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("8 images (6 train, 2 test), 16 nuclei\nfaults: none\n")
    assert found["recommendation"]["command"] in said
    assert said.rstrip().endswith(f"page: {tmp_path / 'page.html'}")
    assert found["faults"]["list"] == []
    assert "No fault was found" in page


def test_the_faults_planted_in_clusters(clusters: Path, tmp_path: Path) -> None:
    solutions = clusters / "train" / "solutions"
    (clusters / "train" / "drawn_00000.png").write_bytes(b"no image")
    write_png(solutions / "drawn_00001.png", np.zeros_like(read_image(solutions / "drawn_00001.png"), np.uint8))
    write_png(solutions / "drawn_00002.png", read_image(solutions / "drawn_00002.png")[:-3].astype(np.uint8))
    (solutions / "drawn_00003.png").unlink()
    stray_HW = read_image(solutions / "drawn_00004.png").astype(np.uint8)
    inside_HW = cv2.distanceTransform((stray_HW == 0).astype(np.uint8), cv2.DIST_L2, 5)
    inside_HW[read_image(clusters / "train" / "drawn_00004.png") == 0] = 0
    row, column = np.unravel_index(inside_HW.argmax(), inside_HW.shape)
    stray_HW[row, column] = 255
    write_png(solutions / "drawn_00004.png", stray_HW)
    found, page = told(clusters, tmp_path)
    assert faults(found) == {
        *(("unusable file", f"train/drawn_0000{number}.png") for number in range(4)),
        ("stray pixels", "train/drawn_00004.png"),
    }
    assert found["counts"]["all"]["images"] == 4
    for number in range(5):
        assert f"train/drawn_0000{number}.png" in page
    assert "has no solution" in page
    assert "is all black" in page


def test_the_faults_planted_in_fields(fields: Path, tmp_path: Path) -> None:
    masks = fields / "train" / "masks"
    (masks / "drawn_00000.tif").write_bytes(b"II*\0")
    (masks / "extra.tif").write_bytes((masks / "drawn_00001.tif").read_bytes())
    write_labels_tiff(masks / "drawn_00002.tif", np.zeros((128, 128), np.int32))
    labels_HW = read_labels(masks / "drawn_00003.tif")
    labels_HW[np.unravel_index((labels_HW == 0).argmax(), labels_HW.shape)[0], 60] = 0
    free_HW = cv2.erode((labels_HW == 0).astype(np.uint8), np.ones((13, 13), np.uint8), borderValue=0)
    row, column = np.argwhere(free_HW)[0]
    labels_HW[row - 2 : row + 3, column - 2 : column + 3] = labels_HW.max()
    write_labels_tiff(masks / "drawn_00003.tif", labels_HW)
    (fields / "test" / "groups.csv").write_text("id,group\n")
    found, _ = told(fields, tmp_path)
    assert faults(found) == {
        ("unusable file", "train/images/drawn_00000.png"),
        ("unusable file", "train/masks/extra.tif"),
        ("unusable file", "test/groups.csv"),
        ("no nucleus", "train/images/drawn_00002.png"),
        ("nucleus in several pieces", "train/images/drawn_00003.png"),
    }
    assert found["counts"]["all"]["images"] == 7


def test_nothing_that_can_be_read(clusters: Path, tmp_path: Path) -> None:
    for path in clusters.rglob("*.png"):
        path.write_bytes(b"")
    found, page = told(clusters, tmp_path)
    assert found["counts"]["all"]["images"] == 0
    assert found["faults"]["counts"] == {"unusable file": {"faults": 8, "files": 8}}
    assert found["recommendation"] is None
    assert "None could be read" in page


def test_one_split_without_its_labels(fields: Path, tmp_path: Path) -> None:
    (fields / "test" / "masks").rename(fields / "test" / "elsewhere")
    found, _ = told(fields, tmp_path)
    assert found["counts"]["all"]["images"] == 6
    assert faults(found) == {("unusable file", "test")}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (None, "does not exist"),
        ([], "has no known layout, it holds nothing"),
        (["images", "masks"], "holds no images"),
        (["train/solutions", "train/images", "train/masks"], "fits the formats nucleus and labels"),
    ],
)
def test_no_data(prepare: list[str] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    for name in prepare or []:
        (root / name).mkdir(parents=True)
    if prepare is not None:
        root.mkdir(exist_ok=True)
    assert explore(root, "--out", tmp_path / "page.html") == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("nuciseg: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_no_folder_was_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert explore() == 2
    assert capsys.readouterr().err == (
        "nuciseg: no data was named; give the folder of a data set, as in python -m nuciseg.explore DATA\n"
    )


def test_an_unknown_layout(clusters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explore(clusters, "--data.format", "nucleos", "--out", tmp_path / "page.html") == 2
    assert "data.format" in capsys.readouterr().err


def test_a_page_that_cannot_be_written(clusters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert explore(clusters, "--out", tmp_path / "file" / "page.html") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_json_to_standard_output(clusters: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nuciseg.explore", str(clusters), "--out", str(tmp_path / "page.html")]
    result = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["counts"]["all"]["images"] == 8
    assert found["format"] == "nucleus"
    assert (tmp_path / "page.html").exists()
