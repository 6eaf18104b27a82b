"""Image files: what is read is what was written, and a damaged file is refused rather than guessed."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import pytest
import tifffile

from nuciseg.errors import DataError, ResourceError
from nuciseg.images import read_image, read_labels, write_bytes, write_labels_tiff, write_png

GREY8 = np.random.default_rng(0).integers(0, 256, (23, 17), dtype=np.uint8)
GREY16 = np.random.default_rng(1).integers(0, 65536, (23, 17), dtype=np.uint16)


def save(path: Path, pixels: np.ndarray) -> Path:
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels)
    else:
        iio.imwrite(path, pixels)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("pixels", [GREY8, GREY16], ids=["uint8", "uint16"])
def test_grey_image_comes_back_exactly(tmp_path: Path, suffix: str, pixels: np.ndarray) -> None:
    image_HW = read_image(save(tmp_path / f"a{suffix}", pixels))
    assert image_HW.dtype == pixels.dtype
    np.testing.assert_array_equal(image_HW, pixels)


def test_jpeg_is_read(tmp_path: Path) -> None:
    smooth_HW = np.full((16, 24), 100, np.uint8)
    np.testing.assert_allclose(read_image(save(tmp_path / "a.jpg", smooth_HW)), smooth_HW, atol=2)


@pytest.mark.parametrize("compression", [1, 5, 8, 32773], ids=["none", "lzw", "deflate", "packbits"])
@pytest.mark.parametrize("pixels", [GREY8, GREY16], ids=["uint8", "uint16"])
def test_tiff_compressions(tmp_path: Path, compression: int, pixels: np.ndarray) -> None:
    path = tmp_path / "a.tif"
    assert cv2.imwrite(str(path), pixels, [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    np.testing.assert_array_equal(read_image(path), pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colour_with_equal_channels_is_grey(tmp_path: Path, suffix: str) -> None:
    opaque_HWC = np.dstack([GREY8, GREY8, GREY8, np.full_like(GREY8, 255)])
    for name, pixels in (("rgb", opaque_HWC[..., :3]), ("rgba", opaque_HWC)):
        np.testing.assert_array_equal(read_image(save(tmp_path / f"{name}{suffix}", pixels)), GREY8)


def test_planar_rgb_tiff_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.stack([GREY8] * 3), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(path), GREY8)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_true_colour_and_real_transparency_are_refused(tmp_path: Path, suffix: str) -> None:
    colour_HWC = np.dstack([GREY8, GREY8, GREY8[::-1]])
    transparent_HWC = np.dstack([GREY8, GREY8, GREY8, GREY8[::-1]])
    for pixels in (colour_HWC, transparent_HWC):
        path = save(tmp_path / f"a{suffix}", pixels)
        with pytest.raises(DataError, match=r"a\.\w+ is a colour image where grey is needed"):
            read_image(path)
        with pytest.raises(DataError, match="colour"):
            read_labels(path)


def test_16_bit_colour_png_is_refused_because_the_decoder_would_cut_it_to_8_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.dstack([GREY16] * 3))
    with pytest.raises(DataError, match="16-bit colour"):
        read_image(path)


@pytest.mark.parametrize("pixels", [GREY8 / 255, GREY8 > 127, GREY8.astype(np.int32)], ids=["float", "bool", "int32"])
def test_other_pixel_types_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(DataError, match="convert the image to 8- or 16-bit"):
        read_image(save(tmp_path / "a.tif", pixels))


def test_1_bit_png_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="bool"):
        read_image(save(tmp_path / "a.png", GREY8 > 127))


def test_axes_of_length_one_are_dropped(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.tif", GREY8[None, None])), GREY8)


def test_stack_and_several_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one grey plane"):
        read_image(save(tmp_path / "stack.tif", np.zeros((5, 8, 9), np.uint8)))
    with tifffile.TiffWriter(tmp_path / "two.tif") as tiff:
        tiff.write(GREY8)
        tiff.write(GREY16[:5])
    with pytest.raises(DataError, match="2 images where one is needed"):
        read_image(tmp_path / "two.tif")


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png")
    for name in ("text.png", "text.tif", "empty.jpg"):
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"this is no image at all")
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            read_image(tmp_path / name)


def encoded(kind: str) -> bytes:
    # Noise, so that no part of the file can be left out without losing pixels.
    pixels = np.random.default_rng(2).integers(0, 256, (40, 40), dtype=np.uint8)
    if kind in ("png", "jpg"):
        return iio.imwrite("<bytes>", pixels, extension=f".{kind}")
    if kind == "lzw":
        done, data = cv2.imencode(".tif", pixels, [cv2.IMWRITE_TIFF_COMPRESSION, 5])
        assert done
        return data.tobytes()
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, compression=None if kind == "plain" else "zlib", rowsperstrip=8)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's word on the cut tail of a TIFF
@pytest.mark.parametrize("kind", ["png", "jpg", "plain", "zlib", "lzw"])
def test_a_file_cut_anywhere_is_refused_or_still_holds_every_pixel(tmp_path: Path, kind: str) -> None:
    data = encoded(kind)
    path = tmp_path / ("a." + (kind if kind in ("png", "jpg") else "tif"))
    path.write_bytes(data)
    whole_HW = read_image(path)
    refused = []
    cuts = [*range(0, len(data) - 64, 29), *range(len(data) - 64, len(data))]
    for cut in cuts:
        path.write_bytes(data[:cut])
        try:
            np.testing.assert_array_equal(read_image(path), whole_HW, err_msg=f"cut at {cut} of {len(data)}")
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > len(cuts) - 64
    assert all(str(path) in message for message in refused)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_with_a_tile_left_out_is_refused_and_not_filled_with_zeros(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.full((32, 64), 9, np.uint8), tile=(16, 16), compression=compression)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        counts = list(tiff.pages.first.databytecounts)
        tiff.pages.first.tags["TileByteCounts"].overwrite([*counts[:-1], 0])
    assert tifffile.imread(path).min() == 0  # this is what would be read
    with pytest.raises(DataError, match="pixels are missing"):
        read_image(path)


@pytest.mark.filterwarnings("ignore")  # what Pillow says about odd headers is not the question here
@pytest.mark.parametrize("kind", ["png", "jpg", "plain", "zlib", "lzw"])
def test_flipped_bytes_never_end_in_a_traceback(tmp_path: Path, kind: str) -> None:
    data = encoded(kind)
    path = tmp_path / ("a." + (kind if kind in ("png", "jpg") else "tif"))
    rng = np.random.default_rng(3)
    for _ in range(150):
        damaged = np.frombuffer(data, np.uint8).copy()
        end = 200 if rng.random() < 0.7 else len(data)
        damaged[rng.integers(0, min(end, len(data)), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(DataError):
            read_image(path)


def test_an_enormous_png_header_is_refused(tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))
    with pytest.raises(DataError, match="bomb"):
        read_image(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.uint32])
def test_labels_of_any_integer_type_become_int32(tmp_path: Path, dtype: type) -> None:
    labels = np.array([[0, 1, 2], [100, 7, 0]], dtype)
    labels_HW = read_labels(save(tmp_path / "a.tif", labels))
    assert labels_HW.dtype == np.int32
    np.testing.assert_array_equal(labels_HW, labels)


def test_labels_that_are_none_are_refused(tmp_path: Path) -> None:
    for pixels in (GREY8.astype(np.float32), GREY8 > 9):
        with pytest.raises(DataError, match=r"a\.tif holds .* where labels are needed"):
            read_labels(save(tmp_path / "a.tif", pixels))
    with pytest.raises(DataError, match="beyond the range of int32"):
        read_labels(save(tmp_path / "b.tif", np.array([[0, 2**31]], np.uint32)))


def test_written_files_come_back(tmp_path: Path) -> None:
    labels_HW = np.array([[0, -1, 70_000], [1, 2, 3]], np.int32)
    write_labels_tiff(tmp_path / "deep" / "labels.tif", labels_HW)
    np.testing.assert_array_equal(read_labels(tmp_path / "deep" / "labels.tif"), labels_HW)
    assert tifffile.imread(tmp_path / "deep" / "labels.tif").dtype == np.int32
    rgb_HWC = np.dstack([GREY8, GREY8.T.reshape(GREY8.shape), GREY8])
    write_png(tmp_path / "a.png", rgb_HWC)
    np.testing.assert_array_equal(iio.imread(tmp_path / "a.png"), rgb_HWC)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "deep", "labels.tif"]


def test_a_failed_write_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_png(tmp_path / "file" / "a.png", GREY8)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ResourceError, match="taken cannot be written"):
        write_bytes(tmp_path / "taken", b"content")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
