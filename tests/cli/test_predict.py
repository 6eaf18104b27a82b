"""`predict`: labels, a picture and a table for each image, how far it is, and which files are meant."""

from __future__ import annotations

import csv
import os
import pty
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from predict_verb import predict, read_summary_rows, write_fields
from written_images import save_zarr

import nuciseg
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.errors import DataError
from nuciseg.images import write_labels_tiff
from nuciseg.outputs import OUTPUT_NAMES
from nuciseg.predict import BY_DEFAULT, OUTPUTS, expand_inputs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six drawn pairs of nuclei, with the folder `solutions` that is no image."""
    root = tmp_path_factory.mktemp("drawn")
    drawing = SyntheticConfig(num_train=2, num_test=6, mean_diameter_px=24.0, nuclei_per_cluster=(2, 2), seed=4)
    write_nucleus_folder(drawing, root)
    return root / "test"


def test_a_folder_of_images(tiny_run: Path, images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nuciseg.predict", "--checkpoint", str(tiny_run), str(images)]
    out = tmp_path / "out"
    result = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "no bar where stderr is no terminal"
    inputs = sorted(images.glob("*.png"))
    lines = result.stdout.splitlines()
    flagged = [line for line in lines[:6] if line.endswith(", look at it")]
    summary = lines[6]
    assert len(inputs) == 6
    doubts = [f"images whose borders do not close, flagged above, may be cut wrongly: {len(flagged)}"]
    assert lines[7:] == (doubts if flagged else [])
    rows = read_summary_rows(out)
    assert [row["file"] for row in rows] == [str(path) for path in inputs]
    num_nuclei = 0
    for path, line, row in zip(inputs, lines[:6], rows, strict=True):
        labels_HW = tifffile.imread(out / f"{path.stem}_masks.tif")
        image_HW = iio.imread(path)
        assert labels_HW.dtype == np.int32
        assert labels_HW.shape == image_HW.shape
        num_found = len(np.unique(labels_HW[labels_HW > 0]))
        assert line.partition(",")[0] == f"{path}: {num_found} nuclei"
        assert (row["status"], row["num_nuclei"]) == ("done", str(num_found))
        num_nuclei += num_found
        overlay = iio.imread(out / f"{path.stem}_overlay.png")
        assert overlay.shape[2] == 3
        assert overlay.shape[0] % labels_HW.shape[0] == 0
        assert np.any(overlay[..., 0] != overlay[..., 1]) == (num_found > 0), "outlines are coloured"
        with (out / f"{path.stem}_measurements.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == num_found
    assert num_nuclei > 0
    assert summary.startswith(f"{num_nuclei} nuclei in 6 images, written to {out}")
    assert len(list(out.iterdir())) == 6 * 3 + 2


def test_the_answer_does_not_depend_on_the_other_images(tiny_run: Path, images: Path, tmp_path: Path) -> None:
    first = min(images.glob("*.png"))
    assert predict("--checkpoint", tiny_run, first, "--out", tmp_path / "one") == 0
    assert predict("--checkpoint", tiny_run, images / "*.png", "--out", tmp_path / "all") == 0
    name = f"{first.stem}_masks.tif"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    assert len(list((tmp_path / "all").glob("*_masks.tif"))) == 6


def test_clusters_whose_borders_do_not_close_are_flagged(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("--checkpoint", "nuciseg/separator", images, "--out", tmp_path / "out") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    num_flagged = 0
    for path, line in zip(sorted(images.glob("*.png")), lines[:6], strict=True):
        num_open = nuciseg.predict(iio.imread(path), checkpoint="nuciseg/separator").num_open_borders
        assert line.endswith(f", open borders: {num_open}, look at it") == (num_open > 0)
        num_flagged += num_open > 0
    assert num_flagged > 0
    assert last == f"images whose borders do not close, flagged above, may be cut wrongly: {num_flagged}"


def test_all_outputs_and_none(tiny_fields_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_fields(tmp_path / "images", 1)
    words = ["--checkpoint", tiny_fields_run, path, "--out", tmp_path / "out"]
    assert predict(*words, "--no-masks", "--no-overlay", "--no-measurements") == 2
    said = capsys.readouterr().err
    assert said == (
        "nuciseg: nothing is to be written; leave one of --masks, --overlay, --measurements, --rois, --geojson on\n"
    )
    assert not (tmp_path / "out").exists()
    assert predict(*words, "--no-masks", "--rois", "--geojson") == 0
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert names == {"summary.csv", "predict.json"} | {
        f"field_00{ending}" for ending in ("_overlay.png", "_measurements.csv", "_rois.zip", ".geojson")
    }


def test_the_flags_are_the_outputs_that_there_are() -> None:
    assert set(OUTPUTS) == set(OUTPUT_NAMES)
    assert set(BY_DEFAULT) < set(OUTPUTS)


def test_help_is_quick_and_says_types_and_units() -> None:
    code = (
        "import sys; from nuciseg.predict import _parser; print(_parser().format_help()); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    said = " ".join(result.stdout.split())
    assert said.endswith("False"), "torch takes seconds to import"
    for text in (
        "micrometres",
        "pixels",
        "path",
        "default: 2048",
        "default: off",
        "from 0",
        "summary.csv",
        "predict.json",
    ):
        assert text in said


@pytest.mark.parametrize("stdout_is_terminal", [False, True])
def test_a_bar_on_a_terminal_and_all_lines_on_stdout(
    tiny_fields_run: Path, tmp_path: Path, stdout_is_terminal: bool
) -> None:
    paths = write_fields(tmp_path / "images", 2)
    command = [sys.executable, "-m", "nuciseg.predict", "--checkpoint", str(tiny_fields_run), *map(str, paths)]
    mine, its = pty.openpty()
    log = tmp_path / "stdout"
    with log.open("w") as file:
        stdout = its if stdout_is_terminal else file
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "300"}
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "out")], stdout=stdout, stderr=its, env=environment
        )
        os.close(its)
        shown = b""
        try:
            while block := os.read(mine, 1 << 16):
                shown += block
        except OSError:  # how a terminal says that nobody writes to it any more
            pass
        os.close(mine)
        assert process.wait(timeout=60) == 0
    assert b"images" in shown
    assert "2/2" in shown.decode()
    lines = (shown.decode() if stdout_is_terminal else log.read_text()).replace("\r", "\n").splitlines()
    for path in paths:
        assert any(line.endswith(" px") and f"{path}: " in line for line in lines)
    if not stdout_is_terminal:
        assert len(lines) == 3
        assert str(paths[0]) not in shown.decode()


# ------------------------------------------------------------------------------------------------ which files are meant
def test_each_file_is_taken_once_and_what_is_no_image_is_left_out(tmp_path: Path) -> None:
    for name in ("b.png", "a.tif", "c.JPG", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    inputs = [str(tmp_path / "b.png"), str(tmp_path), str(tmp_path / "*")]
    found, _ = expand_inputs(inputs, tmp_path / "out")
    assert [path.name for path in found] == ["b.png", "a.tif", "c.JPG"]


def test_results_beside_their_images_are_left_out_of_a_folder(tmp_path: Path) -> None:
    images = ["a.tif", "b.png", "c_img.png", "other_masks.tif", "photo.jpg", "photo_overlay.jpg", "x_overlay.png"]
    results = ["a_cp_masks.png", "a_masks.tif", "a_overlay.png", "b_masks.png", "c_masks.png"]
    for name in images + results:
        (tmp_path / name).write_bytes(b"")
    found, left_out = expand_inputs([str(tmp_path)], tmp_path / "out")
    assert [path.name for path in found] == images
    assert [path.name for path in left_out] == results
    found, left_out = expand_inputs([str(tmp_path), str(tmp_path / "a_masks.tif")], tmp_path / "out")
    assert tmp_path / "a_masks.tif" in found, "named by itself it is meant"
    assert [path.name for path in left_out] == [name for name in results if name != "a_masks.tif"]


def test_how_many_were_left_out_is_said(
    tiny_fields_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = write_fields(tmp_path / "images", 1)
    write_labels_tiff(path.with_name("field_00_masks.tif"), np.ones((96, 96), np.int32))
    assert predict("--checkpoint", tiny_fields_run, path.parent, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith(
        f"left out: 1 label image or overlay that lies beside its image, such as {path.parent / 'field_00_masks.tif'}\n"
    )


def test_a_folder_is_an_image_by_what_it_holds(tmp_path: Path) -> None:
    for name in ("image", "image/labels/nuclei", "several.zarr/0", "several.zarr/1"):
        save_zarr(tmp_path / name, np.ones((8, 8), np.uint8), "yx", "0.4")
    (tmp_path / "odd").mkdir()
    for name in (".zattrs", "zarr.json"):
        (tmp_path / "odd" / name).write_text("[7]" if name == "zarr.json" else '{"multiscales')

    def found(pattern: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in expand_inputs([str(tmp_path / pattern)], tmp_path / "o")[0]]

    assert found("") == found("*") == ["image", "several.zarr"]
    assert found("image") == ["image"]
    assert found("several.zarr/*") == ["several.zarr/0", "several.zarr/1"]
    assert "image/labels/nuclei" not in found("**"), "it belongs to its image"


def test_links_are_images_of_their_own(tmp_path: Path) -> None:
    folder, store = tmp_path / "images", tmp_path / "store"
    for each in (folder, store):
        each.mkdir()
    (store / "content.tif").write_bytes(b"")
    for name, target in (("a.tif", "content.tif"), ("b.tif", "content.tif"), ("gone.tif", "gone"), ("x.zarr", "gone")):
        (folder / name).symlink_to(store / target)
    (folder / "loop.tif").symlink_to("loop.tif")
    (tmp_path / "same").symlink_to(folder)
    found, _ = expand_inputs([str(folder), str(tmp_path / "same"), str(folder / "gone.tif")], tmp_path / "out")
    assert found == [folder / name for name in ("a.tif", "b.tif", "gone.tif", "loop.tif", "x.zarr")]


def test_a_link_to_nothing_is_a_failure(
    tiny_fields_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = write_fields(tmp_path / "images", 1)
    link = path.with_name("gone.tif")
    link.symlink_to("not/there")
    assert predict("--checkpoint", tiny_fields_run, path.parent, "--out", tmp_path / "out") == 2
    assert f"nuciseg: {link} is a link to not/there, which does not exist; fetch it" in capsys.readouterr().err
    assert [row["status"] for row in read_summary_rows(tmp_path / "out")] == ["done", "failed"]


def test_two_images_with_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"one.x\.png and .*two.x\.png would both become x_masks\.tif.*different --out"):
        expand_inputs([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "out")


def test_results_may_not_go_among_the_images(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="is the folder of the images; choose another"):
        expand_inputs([str(tmp_path)], tmp_path / "y" / "..")


def test_an_image_is_never_overwritten_by_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, other = tmp_path / "x.tif", tmp_path / "x_masks.tif"
    for path in (image, other):
        tifffile.imwrite(path, np.ones((8, 8), np.uint8))
    before = other.read_bytes()
    assert predict(image, other, "--out", tmp_path) == 2
    assert f"{other} is to be read and would be overwritten; choose another --out" in capsys.readouterr().err
    assert other.read_bytes() == before
