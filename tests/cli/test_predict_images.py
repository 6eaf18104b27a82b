"""What can be wrong with an image, or unusual about it, and what `predict` makes of it."""

from __future__ import annotations

import csv
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import zarr
from drawn_fields import draw_discs
from numpy.typing import NDArray
from predict_verb import num_masks, predict, read_summary_rows, write_fields
from written_images import save_zarr

from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.images import write_png

FIELD_HW, LABELS_HW = draw_discs((120, 130), 18, seed=7)
NUM_NUCLEI = int(np.count_nonzero(np.bincount(LABELS_HW.ravel())[1:] >= 20))  # less is hardly seen at the edge


def write(path: Path, pixels: NDArray[np.generic], **options: object) -> Path:
    tifffile.imwrite(path, pixels, **{"photometric": "minisblack", **options})
    return path


def refused(capsys: pytest.CaptureFixture[str], out: Path) -> str:
    """The one sentence that was said, after which nothing lies in `out`."""
    said = capsys.readouterr().err
    assert said.startswith("nuciseg: ")
    assert said.count("\n") == 1
    assert not out.exists() or not list(out.iterdir()), "nothing half-written"
    return said


def test_one_bad_image_among_many(tiny_fields_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_fields(tmp_path / "images", 2)
    cut = tmp_path / "cut.tif"
    cut.write_bytes(good[0].read_bytes()[:-2000])
    text = tmp_path / "text.png"
    text.write_text("no image")
    out = tmp_path / "out"
    assert predict("--checkpoint", tiny_fields_run, good[0], cut, text, good[1], "--out", out) == 2
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"nuciseg: {cut} ")
    assert second.startswith(f"nuciseg: {text} cannot be read as an image")
    assert last.startswith("nuciseg: 2 of 4 images could not be predicted")
    assert {path.name for path in out.glob("*_masks.tif")} == {f"{path.stem}_masks.tif" for path in good}
    assert len(list(out.iterdir())) == 2 * 3 + 2
    rows = read_summary_rows(out)
    assert [row["status"] for row in rows] == ["done", "failed", "failed", "done"]
    assert [f"nuciseg: {row['reason']}" for row in rows[1:3]] == [first, second]


def test_a_name_too_long_for_its_results_costs_no_other_image(
    tiny_fields_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = write_fields(tmp_path, 2)
    fits = first.rename(tmp_path / f"{'f' * (255 - len('_measurements.csv'))}.tif")
    long = write(tmp_path / f"{'核' * 80}.tif", FIELD_HW)
    out = tmp_path / "out"
    assert predict("--checkpoint", tiny_fields_run, fits, long, last, "--out", out) == 2
    assert capsys.readouterr().err.splitlines()[0] == (
        f"nuciseg: {long.stem}_measurements.csv has 257 bytes, and a name in {out} at most 255; "
        "shorten the name of the image"
    )
    assert [row["status"] for row in read_summary_rows(out)] == ["done", "failed", "done"]
    words = ["--checkpoint", tiny_fields_run, long, "--out", out, "--resume"]
    assert predict(*words, "--no-measurements") == 0
    assert predict(*words) == 2
    assert "shorten the name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "missing.png names no image"),
        ("*.nothing", "*.nothing names no image"),
        ("empty", "empty names no image"),
        ("text.png", "text.png cannot be read as an image"),
        (
            "stack.tif",
            "holds 5 slices (Z) where one plane is needed; choose it with --plane N, counted from 0 (0 to 4)",
        ),
        ("channels.tif", "has 2 channels where one is needed; choose it with --channel N"),
        ("nan.tif", "nan.tif holds NaN or infinity in 3 of the 15600 pixels"),
        ("large.png", "large.png claims 2.5 gigapixels that can only be read whole"),
    ],
)
def test_bad_input_is_one_sentence(
    tiny_fields_run: Path, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    write(tmp_path / "stack.tif", np.stack([FIELD_HW] * 5), imagej=True, metadata={"axes": "ZYX"})
    write(tmp_path / "channels.tif", np.stack([FIELD_HW] * 2), imagej=True, metadata={"axes": "CYX"})
    with_nan = FIELD_HW.astype(np.float32)
    with_nan[0, :3] = np.nan, np.inf, -np.inf
    write(tmp_path / "nan.tif", with_nan)
    write_claim(tmp_path / "large.png", 50_000)
    out = tmp_path / "out"
    assert predict("--checkpoint", tiny_fields_run, tmp_path / name, "--out", out) == 2
    assert message in refused(capsys, out)


def write_claim(path: Path, side_px: int) -> None:
    """A PNG that says it has so many rows and columns, of which not one is there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side_px, side_px, 8, 0, 0, 0, 0))
    filling = chunk(b"tEXt", b"Comment\0" + b"x" * (side_px**2 // 2000 + 1))  # else the claim alone is incredible
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + filling + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_allowed_to_be_large_it_is_at_least_tried(
    tiny_fields_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real gigapixel takes minutes; the limit is that of a small image here."""
    monkeypatch.setattr("nuciseg.sources.stored.MAX_WHOLE_PX", 1000)
    write_png(tmp_path / "field.png", (FIELD_HW >> 5).astype(np.uint8))
    words = ["--checkpoint", tiny_fields_run, tmp_path / "field.png", "--out", tmp_path / "out"]
    assert predict(*words) == 2
    assert "or read it with --allow-large" in refused(capsys, tmp_path / "out")
    assert predict(*words, "--allow-large") == 0


@pytest.mark.parametrize("alpha", [False, True])
def test_colour_becomes_grey_with_a_notice(
    tiny_fields_run: Path, tmp_path: Path, alpha: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    grey_HW = (FIELD_HW >> 5).astype(np.uint8)
    planes = [grey_HW // 2, grey_HW, grey_HW // 3] + [np.full_like(grey_HW, 255)] * alpha
    write_png(tmp_path / "colour.png", np.stack(planes, axis=-1))
    write_png(tmp_path / "same.png", np.stack([grey_HW] * 3 + [np.full_like(grey_HW, 255)] * alpha, axis=-1))
    assert predict("--checkpoint", tiny_fields_run, tmp_path / "*.png", "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  Colour was turned to grey")
    assert sum("Colour" in line for line in lines) == 1, "three equal channels are no colour"
    assert num_masks(tmp_path / "out" / "colour_masks.tif") == pytest.approx(NUM_NUCLEI, abs=2)


def test_a_plane_of_a_stack_or_all_of_them(tiny_fields_run: Path, tmp_path: Path) -> None:
    dark_HW = np.full_like(FIELD_HW, 400)
    path = write(tmp_path / "stack.tif", np.stack([dark_HW, FIELD_HW, dark_HW]), imagej=True, metadata={"axes": "ZYX"})
    found = {}
    for plane in ("0", "1", "max", "mean"):
        out = tmp_path / plane
        assert predict("--checkpoint", tiny_fields_run, path, "--plane", plane, "--out", out) == 0
        found[plane] = num_masks(out / "stack_masks.tif")
    assert found["0"] == 0
    assert found["1"] == found["max"] == pytest.approx(NUM_NUCLEI, abs=2)
    assert found["mean"] == pytest.approx(NUM_NUCLEI, abs=2)


def test_one_channel_of_several(tiny_fields_run: Path, tmp_path: Path) -> None:
    pixels = np.stack([np.full_like(FIELD_HW, 400), FIELD_HW])
    path = write(tmp_path / "channels.tif", pixels, imagej=True, metadata={"axes": "CYX"})
    for channel, num_nuclei in (("0", 0), ("1", NUM_NUCLEI)):
        out = tmp_path / channel
        assert predict("--checkpoint", tiny_fields_run, path, "--channel", channel, "--out", out) == 0
        assert num_masks(out / "channels_masks.tif") == pytest.approx(num_nuclei, abs=2)


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_one_image_of_an_ome_zarr_of_several(
    tiny_fields_run: Path, tmp_path: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    several, out = tmp_path / "several.zarr", tmp_path / "out"
    zarr.open_group(several, mode="w", zarr_format=2 if version == "0.4" else 3)
    for name in ("0", "1"):
        save_zarr(several / name, FIELD_HW, "yx", version)
    zarr.consolidate_metadata(several)
    words = ["--checkpoint", tiny_fields_run, "--out", out]
    assert predict(*words, several) == 2
    assert f"give the folder of one image, such as {several / '0'} where" in capsys.readouterr().err
    assert predict(*words, several / "0") == 0
    assert predict(*words, several / "0", "--resume") == 0
    assert "1 of 1 images were finished before" in capsys.readouterr().out
    assert num_masks(out / "several_0_masks.tif") == pytest.approx(NUM_NUCLEI, abs=2)
    several.rename(tmp_path / "several")
    assert predict(*words, tmp_path / "several") == 0
    assert {path.name for path in out.glob("?_masks.tif")} == {"0_masks.tif", "1_masks.tif"}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, ">u2", np.int16])
def test_any_type_of_number(tiny_fields_run: Path, tmp_path: Path, dtype: str) -> None:
    pixels_HW = (FIELD_HW // 32).astype(dtype)
    path = write(tmp_path / "field.tif", pixels_HW, byteorder=">" if dtype == ">u2" else "=")
    assert predict("--checkpoint", tiny_fields_run, path, "--out", tmp_path / "out") == 0
    assert num_masks(tmp_path / "out" / "field_masks.tif") == pytest.approx(NUM_NUCLEI, abs=2)


@pytest.mark.parametrize("value", [0, 400, 65535])
def test_an_image_of_one_value_has_no_nuclei_and_whole_files(tiny_fields_run: Path, tmp_path: Path, value: int) -> None:
    path = write(tmp_path / "flat.tif", np.full((50, 70), value, np.uint16))
    out = tmp_path / "out"
    assert predict("--checkpoint", tiny_fields_run, path, "--rois", "--geojson", "--out", out) == 0
    assert num_masks(out / "flat_masks.tif") == 0
    assert tifffile.imread(out / "flat_masks.tif").shape == (50, 70)
    assert iio.imread(out / "flat_overlay.png").ndim == 3
    assert zipfile.ZipFile(out / "flat_rois.zip").namelist() == []
    assert json.loads((out / "flat.geojson").read_text())["features"] == []
    with (out / "flat_measurements.csv").open(newline="") as file:
        table = csv.DictReader(file)
        assert list(table) == []
        assert table.fieldnames is not None
    assert read_summary_rows(out)[0]["num_nuclei"] == "0"


@pytest.mark.parametrize("shape", [(1, 1), (10, 2000), (2000, 3)])
def test_unusual_sizes(tiny_fields_run: Path, tmp_path: Path, shape: tuple[int, int]) -> None:
    path = write(tmp_path / "x.tif", np.random.default_rng(0).integers(1, 5000, shape).astype(np.uint16))
    out = tmp_path / "out"
    assert predict("--checkpoint", tiny_fields_run, path, "--rois", "--geojson", "--out", out) == 0
    assert tifffile.imread(out / "x_masks.tif").shape == shape


# ------------------------------------------------------------------------------------------------------ sizes
@pytest.mark.parametrize("text", ["", "0", "-3", "8mm", "nan", "inf", "9" * 400, "8 um 3", "px"])
def test_a_diameter_that_is_none(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_fields(tmp_path / "images", 1)
    assert predict(path, f"--diameter={text}", "--out", tmp_path / "out") == 2
    assert "is no size; give pixels, such as 30, or micrometres, such as 8um" in refused(capsys, tmp_path / "out")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf"])
def test_a_pixel_size_that_is_none(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_fields(tmp_path / "images", 1)
    assert predict(path, f"--pixel-size={text}", "--out", tmp_path / "out") == 2
    assert f"--pixel-size {text} is no size; give the width of a pixel in um" in refused(capsys, tmp_path / "out")


def test_a_diameter_in_micrometres_needs_a_pixel_size(
    tiny_fields_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown, known = write(tmp_path / "unknown.tif", FIELD_HW), tmp_path / "known.tif"
    write(known, FIELD_HW, imagej=True, resolution=(2, 2), metadata={"unit": "um"})  # 0.5 um a pixel
    out = tmp_path / "out"
    words = ["--checkpoint", tiny_fields_run, "--out", out, "--diameter", "9um"]
    assert predict(*words, unknown) == 2
    said = refused(capsys, out)
    assert "does not say how large a pixel is, or has" in said
    assert "so a diameter of 9 um means nothing there; give --pixel-size UM" in said
    assert predict(*words, unknown, "--pixel-size", "0.25") == 0
    row = read_summary_rows(out)[0]
    assert (row["diameter_used_px"], row["pixel_size_um"]) == ("36.0", "0.25")
    assert predict(*words, known) == 0
    row = read_summary_rows(out)[0]
    assert (row["diameter_used_px"], row["pixel_size_um"]) == ("18.0", "0.5")
    assert float(row["median_diameter_um"]) == pytest.approx(float(row["median_diameter_px"]) / 2)
    assert predict(*words, known, "--pixel-size", "20") == 2
    assert "would be 0.45 pixels wide in" in capsys.readouterr().err


def test_a_diameter_in_pixels_scales_the_image(
    tiny_fields_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_HW, labels_HW = draw_discs((400, 400), 72, seed=3, least_gap=1.3)
    path = write(tmp_path / "large.tif", image_HW)
    whole = int(np.count_nonzero(np.bincount(labels_HW.ravel())[1:] > 500))
    said = []
    for words in (["--diameter", "72"], ["--diameter", "72px"], []):
        assert predict("--checkpoint", tiny_fields_run, path, *words, "--out", tmp_path / "out") == 0
        assert num_masks(tmp_path / "out" / "large_masks.tif") == pytest.approx(whole, abs=1)
        said.append(capsys.readouterr().out.splitlines()[0])
    assert said[0] == said[1]
    assert said[0].endswith(", diameter 72 px")
    assert ", estimated diameter " in said[2]


# -------------------------------------------------------------------------------------------------- the right network
def test_clusters_and_fields_are_told_apart(
    tiny_run: Path, tiny_fields_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nucleus_folder(SyntheticConfig(num_train=2, num_test=1, mean_diameter_px=24.0), tmp_path)
    (cluster,) = (tmp_path / "test").glob("*.png")
    field = write(tmp_path / "field.tif", FIELD_HW)
    out = tmp_path / "out"
    assert predict("--checkpoint", tiny_run, field, "--out", out) == 2
    said = refused(capsys, out)
    assert f"{field} is no cluster of nuclei cut out on black" in said
    assert "for whole fields take --checkpoint nuciseg/fields" in said
    assert predict("--checkpoint", tiny_fields_run, cluster, "--out", out) == 2
    said = refused(capsys, out)
    assert f"{cluster} is a cluster of nuclei cut out on black" in said
    assert "take --checkpoint nuciseg/separator" in said


# ------------------------------------------------------------------------------------------------ where results go
def test_a_folder_that_cannot_be_made(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_fields(tmp_path / "images", 1)
    (tmp_path / "file").write_text("")
    assert predict("--checkpoint", tiny_run, path, "--out", tmp_path / "file" / "out") == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_read_only(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_fields(tmp_path / "images", 1)
    (tmp_path / "out").mkdir(mode=0o500)
    assert predict("--checkpoint", tiny_run, path, "--out", tmp_path / "out") == 2
    assert "cannot be written (Permission denied); choose another" in capsys.readouterr().err


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_fields(tmp_path / "images", 1)
    assert predict("--checkpoint", tmp_path, path, "--out", tmp_path / "out") == 2
    assert "is not a checkpoint and holds none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
