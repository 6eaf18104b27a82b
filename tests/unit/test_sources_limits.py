"""What `open_source` refuses, and what it never reads whole."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from written_images import GREY8, GREY16, STACK, read_by_windows, save_tiff, save_zarr, whole

from nuciseg.errors import DataError
from nuciseg.sources import open_source, stored


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    read_by_windows(monkeypatch)


# What cannot be used


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tif does not exist"):
        whole(tmp_path / "gone.tif")
    for name in ("text.png", "text.tif", "empty.jpg"):
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"this is no image at all")
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            whole(tmp_path / name)
    (tmp_path / "folder.zarr").mkdir()
    with pytest.raises(DataError, match=r"folder\.zarr is a folder but no OME-Zarr image"):
        whole(tmp_path / "folder.zarr")


def test_zarr_that_is_no_image_is_refused(tmp_path: Path) -> None:
    zarr.save_array(tmp_path / "array.zarr", GREY8)
    zarr.open_group(tmp_path / "group.zarr", mode="w")
    for name in ("array", "group"):
        with pytest.raises(DataError, match=rf"{name}\.zarr describes no OME-Zarr image"):
            whole(tmp_path / f"{name}.zarr")
    with pytest.raises(DataError, match=r"below 0\.4"):
        whole(save_zarr(tmp_path / "old.zarr", GREY8, "yx", axes=["y", "x"]))
    for wrong in ({"axes": [{"name": 1}, {"name": "y"}]}, {"datasets": 5}, {"coordinateTransformations": [7]}):
        with pytest.raises(DataError, match=r"odd\.zarr cannot be read"):
            whole(save_zarr(tmp_path / "odd.zarr", GREY8, "yx", **wrong))
    with pytest.raises(DataError, match=r"lost\.zarr cannot be read"):
        whole(save_zarr(tmp_path / "lost.zarr", GREY8, "yx", datasets=[{"path": "7"}]))


def test_a_damaged_chunk_is_refused(tmp_path: Path, windows: None) -> None:
    path = save_zarr(tmp_path / "a.zarr", GREY16, "yx")
    (path / "0" / "c" / "1" / "1").write_bytes(b"damaged")
    with open_source(path) as source:
        np.testing.assert_array_equal(source.read(0, 0, 16, 60), GREY16[:16])
        with pytest.raises(DataError, match=r"a\.zarr cannot be read"):
            source.read(0, 0, 40, 60)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.tif", {}),
        ("a.tif", {"compression": "zlib", "tile": (16, 16)}),
        ("a.tif", {"compression": "lzw", "rowsperstrip": 8}),
        ("a.tif", {"imagej": True, "metadata": {"axes": "ZYX"}}),
        ("a.ome.tif", {"tile": (16, 16), "metadata": {"axes": "ZYX"}}),
    ],
    ids=["png", "plain", "zlib tiles", "lzw", "ImageJ", "OME"],
)
def test_a_file_cut_anywhere_is_refused_or_still_holds_every_pixel(
    tmp_path: Path, windows: None, name: str, options: dict[str, Any]
) -> None:
    path = tmp_path / name
    if name.endswith("png"):
        iio.imwrite(path, GREY8)
    else:
        save_tiff(path, STACK[:2], **options)
    plane = None if name.endswith("png") else 1
    data, whole_HW = path.read_bytes(), whole(path, plane=plane)
    refused = 0
    cuts = [*range(0, len(data) - 40, len(data) // 40), *range(len(data) - 40, len(data))]
    for cut in cuts:
        path.write_bytes(data[:cut])
        try:
            np.testing.assert_array_equal(whole(path, plane=plane), whole_HW, err_msg=f"cut at {cut} of {len(data)}")
        except DataError as error:
            refused += str(path) in str(error)
    assert refused > len(cuts) - 45  # what is cut off the very end may be words alone


def test_of_a_damaged_file_one_sentence_is_said(tmp_path: Path) -> None:
    data = save_tiff(tmp_path / "a.tif", STACK, imagej=True).read_bytes()
    (tmp_path / "a.tif").write_bytes(data[:10_000])
    code = """if True:
        import sys
        from nuciseg.errors import DataError
        from nuciseg.sources import open_source
        try:
            open_source(sys.argv[1]).__enter__()
        except DataError as error:
            print(error)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "a.tif")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "truncated or damaged" in done.stdout
    assert done.stderr == ""


def test_one_file_of_a_set_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"photometric": "minisblack"}
    path = save_tiff(tmp_path / "a.ome.tif", STACK, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(path) as tiff:
        described = tiff.ome_metadata
    elsewhere = described.replace("</TiffData>", "").replace(
        '<TiffData IFD="0" PlaneCount="5"/>',
        '<TiffData IFD="0" FirstZ="0" PlaneCount="1"/><TiffData IFD="0" FirstZ="1" PlaneCount="1">'
        '<UUID FileName="b.ome.tif">urn:uuid:7</UUID></TiffData>',
    )
    assert elsewhere != described
    tifffile.imwrite(path, STACK[0], description=elsewhere, metadata=None, **options)
    tifffile.imwrite(tmp_path / "b.ome.tif", STACK[1], metadata=None, **options)
    with pytest.raises(DataError, match=r"a\.ome\.tif is one file of an OME-TIFF of several"):
        whole(path, plane=0)
    (tmp_path / "b.ome.tif").unlink()
    with pytest.raises(DataError, match=r"a\.ome\.tif is truncated or damaged"):
        whole(path, plane=0)


def test_several_images_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "two.tif") as tiff:
        tiff.write(GREY8)
        tiff.write(GREY16[:5])
    with pytest.raises(DataError, match="2 images where one is needed"):
        whole(tmp_path / "two.tif")


# Size


def test_an_image_that_must_be_read_whole_is_refused_beyond_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MAX_WHOLE_PX", 2000)
    iio.imwrite(tmp_path / "a.png", GREY8)
    save_tiff(tmp_path / "strips.tif", GREY8, compression="zlib", rowsperstrip=8)
    save_tiff(tmp_path / "one.tif", np.zeros((64, 64), np.uint8), compression="zlib", tile=(64, 64))
    for name in ("a.png", "strips.tif", "one.tif"):
        with pytest.raises(DataError, match=r"gigapixels that can only be read whole; .*--allow-large"):
            whole(tmp_path / name)
        assert whole(tmp_path / name, allow_large=True).size > 2000
    for name, options in (("tiles.tif", {"tile": (16, 16)}), ("plain.tif", {})):
        np.testing.assert_array_equal(whole(save_tiff(tmp_path / name, GREY8, **options)), GREY8)
    np.testing.assert_array_equal(whole(save_zarr(tmp_path / "a.zarr", GREY8, "yx")), GREY8)


def test_what_lies_in_one_large_piece_is_decoded_once(tmp_path: Path, windows: None) -> None:
    path = save_zarr(tmp_path / "a.zarr", GREY8, "yx", chunk=64)
    with open_source(path) as source:
        (path / "0" / "c" / "0" / "0").unlink()
        np.testing.assert_array_equal(source.read(3, 5, 20, 30), GREY8[3:23, 5:35])


def test_a_header_that_claims_much_more_than_the_file_can_hold_is_damaged(tmp_path: Path) -> None:
    iio.imwrite(tmp_path / "a.png", GREY8)
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = (90_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    save_tiff(tmp_path / "a.tif", GREY8, compression="zlib", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[tag].overwrite(30_000)
    for name in ("a.png", "a.tif"):
        with pytest.raises(DataError, match="truncated or damaged"):
            whole(tmp_path / name, allow_large=True)


@pytest.mark.parametrize("compression", ["zstd", "lzma", "zlib", "lzw", "jpeg2000"])
@pytest.mark.parametrize("bits", [1, 8])
def test_a_blank_image_is_none_that_is_damaged(tmp_path: Path, compression: str, bits: int) -> None:
    """Codecs without a bound to their ratio take hardly more than the header, and a pixel may be one bit."""
    if (bits, compression) == (1, "jpeg2000"):
        pytest.skip("it has no pixels of one bit")
    pixels = np.zeros((2000, 2000), bool if bits == 1 else np.uint8)
    path = save_tiff(tmp_path / "a.tif", pixels, compression=compression, rowsperstrip=2000, metadata=None)
    assert not whole(path).any()


def test_a_blank_picture_is_none_that_is_damaged(tmp_path: Path) -> None:
    blank = Image.new("1", (2000, 2000))
    blank.save(tmp_path / "a.tif", compression="group4")
    blank.save(tmp_path / "a.png")
    blank.convert("L").save(tmp_path / "a.webp", lossless=True)
    for suffix in ("tif", "png", "webp"):
        assert not whole(tmp_path / f"a.{suffix}").any()


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"compression": "lzma"}])
def test_a_blank_image_of_gigapixels_has_to_be_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(stored, "MAX_WHOLE_PX", 2000**2 - 1)
    path = save_tiff(tmp_path / "a.tif", np.zeros((2000, 2000), np.uint8), rowsperstrip=2000, **options)
    with pytest.raises(DataError, match=r"gigapixels that can only be read whole; .*--allow-large"):
        whole(path)
    assert not whole(path, allow_large=True).any()


def test_a_png_beyond_the_limit_of_the_decoder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    iio.imwrite(tmp_path / "a.png", GREY8)
    np.testing.assert_array_equal(whole(tmp_path / "a.png"), GREY8)
    assert Image.MAX_IMAGE_PIXELS == 100


_PEAK = """
import resource, sys
from nuciseg.sources import open_source
import zarr, zarr.storage
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_source(sys.argv[1]) as source:
    assert source.shape == (20000, 20000)
    window_HW = source.read(5000, 1000, 512, 512)
print(int(window_HW[0, 0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["tiles", "plain", "zarr"])
def test_a_window_of_400_megapixels_takes_little_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.zarr" if kind == "zarr" else "a.tif")
    if kind == "tiles":
        tiles = [zlib.compress(bytes([80]) * 1024**2)] * 400
        options: dict[str, Any] = {"tile": (1024, 1024), "compression": "zlib", "metadata": None}
        tifffile.imwrite(path, iter(tiles), shape=(20000, 20000), dtype=np.uint8, photometric="minisblack", **options)
    elif kind == "plain":
        image_HW = tifffile.memmap(path, shape=(20000, 20000), dtype=np.uint8, photometric="minisblack")
        image_HW[5000:5512, 1000:1512] = 80
        image_HW.flush()
        del image_HW
    else:
        save_zarr(path, np.zeros((1, 1), np.uint8), "yx")
        image = zarr.open_group(path).create_array(
            "0", shape=(20000, 20000), chunks=(1024, 1024), dtype="uint8", overwrite=True
        )
        image[5000:5512, 1000:1512] = 80
    command = [sys.executable, "-c", _PEAK, str(path)]
    value, peak_KiB = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(value) == 80
    assert int(peak_KiB) < 100 * 1024  # the whole image has 381 MiB


def test_importing_is_quick_and_leaves_zarr_for_later() -> None:
    code = "import sys, nuciseg.sources; print({'zarr', 'dask', 'bioio', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
