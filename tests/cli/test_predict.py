"""`predict`: labels and a picture for each image, whatever is given, and a sentence for what cannot be used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile

from nuciseg.cli import run_verb
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.errors import DataError
from nuciseg.images import write_png
from nuciseg.predict import expand_inputs, main


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six drawn pairs of nuclei, with the folder `solutions` that is no image."""
    root = tmp_path_factory.mktemp("drawn")
    drawing = SyntheticConfig(num_train=2, num_test=6, mean_diameter_px=24.0, nuclei_per_cluster=(2, 2), seed=4)
    write_nucleus_folder(drawing, root)
    return root / "test"


def predict(*words: str | Path) -> int:
    """The exit code of the verb, in this process: importing torch once more takes seconds."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


def test_a_folder_of_images(tiny_run: Path, images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nuciseg.predict", "--checkpoint", str(tiny_run), str(images)]
    result = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    inputs = sorted(images.glob("*.png"))
    lines = result.stdout.splitlines()
    flagged = [line for line in lines[:6] if line.endswith(", look at it")]
    summary = lines[6]
    assert len(inputs) == 6
    doubts = [f"images whose borders do not close, flagged above, may be cut wrongly: {len(flagged)}"]
    assert lines[7:] == (doubts if flagged else [])
    num_nuclei = 0
    for path, line in zip(inputs, lines[:6], strict=True):
        labels_HW = tifffile.imread(tmp_path / "out" / f"{path.stem}_masks.tif")
        image_HW = iio.imread(path)
        assert labels_HW.dtype == np.int32
        assert labels_HW.shape == image_HW.shape
        num_found = len(np.unique(labels_HW[labels_HW > 0]))
        assert line.partition(",")[0] == f"{path}: {num_found} nuclei"
        num_nuclei += num_found
        overlay = iio.imread(tmp_path / "out" / f"{path.stem}_overlay.png")
        assert overlay.shape[2] == 3
        assert overlay.shape[0] % labels_HW.shape[0] == 0
        assert np.any(overlay[..., 0] != overlay[..., 1]) == (num_found > 0), "outlines are coloured"
    assert num_nuclei > 0
    assert summary.startswith(f"{num_nuclei} nuclei in 6 images, written to {tmp_path / 'out'}")
    assert len(list((tmp_path / "out").iterdir())) == 12


def test_the_answer_does_not_depend_on_the_other_images(tiny_run: Path, images: Path, tmp_path: Path) -> None:
    first = min(images.glob("*.png"))
    assert predict("--checkpoint", tiny_run, first, "--out", tmp_path / "one") == 0
    assert predict("--checkpoint", tiny_run, images / "*.png", "--out", tmp_path / "all") == 0
    name = f"{first.stem}_masks.tif"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    assert len(list((tmp_path / "all").glob("*_masks.tif"))) == 6


def test_one_bad_image_among_many(
    tiny_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted(images.glob("*.png"))[:2]
    cut = tmp_path / "cut.png"
    cut.write_bytes(good[0].read_bytes()[:300])
    small = tmp_path / "small.png"
    write_png(small, np.ones((5, 40), np.uint8))
    out = tmp_path / "out"
    assert predict("--checkpoint", tiny_run, good[0], cut, small, good[1], "--out", out) == 2
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"nuciseg: {cut} cannot be read as an image")
    assert f"{str(small)!r} has 5x40 pixels, the network needs at least 8" in second
    assert last.startswith("nuciseg: 2 of 4 images could not be predicted")
    assert {path.name for path in out.glob("*_masks.tif")} == {f"{path.stem}_masks.tif" for path in good}
    assert len(list(out.iterdir())) == 4


def colour(path: Path) -> None:
    write_png(path, np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "missing.png names no image"),
        ("*.nothing", "*.nothing names no image"),
        ("empty", "empty names no image"),
        ("text.png", "text.png cannot be read as an image"),
        ("colour.png", "colour.png is a colour image where grey is needed"),
        ("float.tif", "float.tif holds float32 pixels"),
        ("small.png", "has 5x40 pixels, the network needs at least 8"),
    ],
)
def test_bad_input_is_one_sentence(
    tiny_run: Path, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    colour(tmp_path / "colour.png")
    tifffile.imwrite(tmp_path / "float.tif", np.ones((40, 40), np.float32))
    write_png(tmp_path / "small.png", np.ones((5, 40), np.uint8))
    out = tmp_path / "out"
    assert predict("--checkpoint", tiny_run, tmp_path / name, "--out", out) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("nuciseg: ")
    assert said.count("\n") == 1
    assert not out.exists() or not list(out.iterdir()), "nothing half-written"


def test_a_folder_that_cannot_be_written(
    tiny_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert predict("--checkpoint", tiny_run, images, "--out", tmp_path / "file" / "out") == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_no_checkpoint(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("--checkpoint", tmp_path, images, "--out", tmp_path / "out") == 2
    assert "is not a checkpoint and holds none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ which files are meant
def test_each_file_is_taken_once_and_what_is_no_image_is_left_out(tmp_path: Path) -> None:
    for name in ("b.png", "a.tif", "c.JPG", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    inputs = [str(tmp_path / "b.png"), str(tmp_path), str(tmp_path / "*")]
    found = expand_inputs(inputs, tmp_path / "out")
    assert [path.name for path in found] == ["b.png", "a.tif", "c.JPG"]


def test_two_images_with_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"one.x\.png and .*two.x\.png would both become x_masks\.tif"):
        expand_inputs([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "out")


def test_results_may_not_go_among_the_images(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="is the folder of the images; choose another"):
        expand_inputs([str(tmp_path)], tmp_path / "y" / "..")
