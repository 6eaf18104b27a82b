"""Images read by windows: real files of every kind, and what is asked of the user."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from PIL import Image
from written_images import CHANNELS, GREY8, GREY16, RGB, STACK, read_by_windows, save_tiff, save_zarr, whole

from nuciseg.errors import DataError
from nuciseg.sources import open_source


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    read_by_windows(monkeypatch)


# What comes in


@pytest.mark.parametrize("pixels", [GREY8, GREY16, GREY16.astype(np.float32) / 7], ids=["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"compression": "lzw", "rowsperstrip": 7},
        {"compression": "zstd", "tile": (16, 16)},
        {"tile": (16, 32)},
        {"rowsperstrip": 7, "byteorder": ">"},
    ],
    ids=["one strip", "zlib", "lzw strips", "zstd tiles", "tiles", "big-endian"],
)
def test_windows_of_a_tiff_are_the_pixels_written(
    tmp_path: Path, windows: None, pixels: np.ndarray, options: dict[str, Any]
) -> None:
    path = save_tiff(tmp_path / "a.tif", pixels, **options)
    with open_source(path) as source:
        assert (source.path, source.shape, source.dtype, source.notices) == (path, (40, 60), pixels.dtype, ())
        for top, left, height, width in ((0, 0, 40, 60), (3, 5, 20, 33), (39, 59, 1, 1)):
            window_HW = source.read(top, left, height, width)
            assert window_HW.dtype == pixels.dtype
            np.testing.assert_array_equal(window_HW, pixels[top : top + height, left : left + width])


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_window_is_a_copy_of_its_own(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    iio.imwrite(path, GREY8)
    with open_source(path) as source:
        source.read(0, 0, 40, 60)[:] = 0
        np.testing.assert_array_equal(source.read(0, 0, 40, 60), GREY8)


@pytest.mark.parametrize("pixels", [GREY8, GREY16], ids=["uint8", "uint16"])
def test_png_and_jpeg(tmp_path: Path, pixels: np.ndarray) -> None:
    iio.imwrite(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(whole(tmp_path / "a.png"), pixels)
    iio.imwrite(tmp_path / "a.jpg", np.full((16, 24), 100, np.uint8))
    np.testing.assert_allclose(whole(tmp_path / "a.jpg"), 100, atol=2)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(tmp_path: Path, windows: None, version: str) -> None:
    path = save_zarr(tmp_path / "a.zarr", CHANNELS[:, None], "czyx", version, names=["DAPI", "GFP"])
    with open_source(path, channel=1) as source:
        assert (source.shape, source.dtype, source.pixel_size_um) == ((40, 60), np.uint16, 0.5)
        np.testing.assert_array_equal(source.read(3, 5, 20, 30), CHANNELS[1, 3:23, 5:35])
    with pytest.raises(DataError, match=r"2 channels \(0 DAPI, 1 GFP\)"):
        whole(path)


def test_the_finest_level_of_a_pyramid_is_taken(tmp_path: Path, windows: None) -> None:
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"photometric": "minisblack", "tile": (16, 16)}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(GREY16, subifds=1, metadata={"axes": "YX"}, **options)
        tiff.write(GREY16[::2, ::2], subfiletype=1, **options)
    np.testing.assert_array_equal(whole(path), GREY16)


def test_the_thumbnail_beside_a_slide_is_left_out(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(GREY16, photometric="minisblack", metadata=None)
        tiff.write(GREY8[:7, :5], photometric="minisblack", metadata=None, subfiletype=1)
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), GREY16)


@pytest.mark.parametrize("shape", [(1, 1), (10, 20_000), (20_000, 10)])
def test_shapes_at_the_limits(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = np.full(shape, 7, np.uint8)
    np.testing.assert_array_equal(whole(save_tiff(tmp_path / "a.tif", pixels)), pixels)
    iio.imwrite(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(whole(tmp_path / "a.png"), pixels)


# Pixel types


@pytest.mark.parametrize(
    ("pixels", "dtype", "is_rounded"),
    [
        (GREY8 > 100, np.uint8, False),
        (GREY16.astype(np.int16) - 9, np.float32, False),
        (GREY16.astype(np.int32), np.float32, False),
        (np.full((4, 5), 2**24 + 1, np.int32), np.float32, True),
        (GREY8 / 3, np.float32, True),
    ],
    ids=["bool", "int16", "small int32", "large int32", "float64"],
)
def test_other_types_become_one_of_three(tmp_path: Path, pixels: np.ndarray, dtype: type, is_rounded: bool) -> None:
    path = save_tiff(tmp_path / "a.tif", pixels)
    with open_source(path) as source:
        assert source.dtype == dtype
        np.testing.assert_array_equal(source.read(0, 0, *source.shape), pixels.astype(dtype))
        assert source.notices == ((f"{pixels.dtype} pixels were rounded to float32.",) if is_rounded else ())


def test_complex_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds complex64 pixels"):
        whole(save_tiff(tmp_path / "a.tif", GREY8.astype(np.complex64)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_counted_where_they_are_read(tmp_path: Path, wrong: float) -> None:
    pixels = GREY8.astype(np.float32)
    pixels[20:22, 30:33] = wrong
    path = save_tiff(tmp_path / "a.tif", pixels)
    with open_source(path) as source:
        np.testing.assert_array_equal(source.read(0, 0, 20, 60), pixels[:20])
        with pytest.raises(DataError, match=r"a\.tif holds NaN or infinity in 6 of the 600 pixels from row 15, "):
            source.read(15, 0, 10, 60)


def test_numbers_beyond_float32_are_refused_as_infinite(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds NaN or infinity in 12 of the 12 pixels"):
        whole(save_tiff(tmp_path / "a.tif", np.full((3, 4), 1e300)))


def test_infinite_pixels_of_a_projection_are_refused(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4), np.float32)
    pixels[:, 1, 1] = np.inf, -np.inf
    for projection in ("max", "mean"):
        with pytest.raises(DataError, match="holds NaN or infinity in 1 of the 12 pixels"):
            whole(save_tiff(tmp_path / "a.tif", pixels), plane=projection)


# Colour


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_colour_becomes_grey_and_that_is_said(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    iio.imwrite(path, RGB)
    with open_source(path) as source:
        assert source.dtype == np.uint8
        assert [notice[:25] for notice in source.notices] == ["Colour was turned to grey"]
        np.testing.assert_allclose(source.read(0, 0, 40, 60), RGB @ [0.299, 0.587, 0.114], atol=0.5001)
    with open_source(path, channel=2) as source:
        assert source.notices == ()
        np.testing.assert_array_equal(source.read(0, 0, 40, 60), RGB[..., 2])
    with pytest.raises(DataError, match=r"no channel 3 but 3 channels \(0 red, 1 green, 2 blue\)"):
        whole(path, channel=3)


@pytest.mark.parametrize("pixels", [GREY8, GREY16 * 16, GREY16.astype(np.float32) / 7], ids=["8", "16", "float"])
def test_equal_channels_come_back_exactly(tmp_path: Path, pixels: np.ndarray) -> None:
    path = save_tiff(tmp_path / "a.tif", np.dstack([pixels] * 3), photometric="rgb", tile=(16, 16))
    with open_source(path) as source:
        assert source.notices == ()
        np.testing.assert_array_equal(source.read(0, 0, 40, 60), pixels)


def test_planar_colour_read_by_windows(tmp_path: Path, windows: None) -> None:
    path = tmp_path / "a.tif"
    save_tiff(path, np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate", tile=(16, 16))
    with open_source(path) as source:
        assert len(source.notices) == 1
        grey_HW = RGB[2:22, 3:33] @ [0.299, 0.587, 0.114]
        np.testing.assert_allclose(source.read(2, 3, 20, 30), grey_HW, atol=0.5001)


def test_jpeg_tiles_of_a_slide(tmp_path: Path, windows: None) -> None:
    smooth = np.dstack([np.full((64, 96), value, np.uint8) for value in (200, 100, 50)])
    path = save_tiff(tmp_path / "a.svs", smooth, photometric="rgb", compression="jpeg", tile=(16, 16))
    np.testing.assert_allclose(whole(path), 0.299 * 200 + 0.587 * 100 + 0.114 * 50, atol=3)


def test_a_printers_jpeg_is_colour_and_not_transparent(tmp_path: Path) -> None:
    Image.new("RGB", (24, 16), (200, 100, 50)).convert("CMYK").save(tmp_path / "a.jpg")
    np.testing.assert_allclose(whole(tmp_path / "a.jpg"), 0.299 * 200 + 0.587 * 100 + 0.114 * 50, atol=3)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_alpha_is_dropped_where_it_hides_nothing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    iio.imwrite(path, np.dstack([GREY8, GREY8, GREY8, np.full_like(GREY8, 255)]))
    with open_source(path) as source:
        assert source.notices == ()
        np.testing.assert_array_equal(source.read(0, 0, 40, 60), GREY8)
    alpha = np.full_like(GREY8, 255)
    alpha[3, 4:6] = 0
    iio.imwrite(path, np.dstack([GREY8, GREY8, GREY8, alpha]))
    with pytest.raises(DataError, match="has 2 transparent pixels"):
        whole(path)
    np.testing.assert_array_equal(whole(path, channel=1), GREY8)


def test_a_fourth_channel_that_is_called_alpha_can_be_taken(tmp_path: Path) -> None:
    pixels = np.dstack([RGB, GREY8])
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    for channel in range(4):
        np.testing.assert_array_equal(whole(tmp_path / "a.tif", channel=channel), pixels[..., channel])
    listed = r"4 channels \(0 red, 1 green, 2 blue, 3 alpha\)"
    with pytest.raises(DataError, match=rf"no channel 4 but {listed}"):
        whole(tmp_path / "a.tif", channel=4)
    with pytest.raises(DataError, match=rf"transparent pixels; .* or choose one of its {listed} with --channel N"):
        whole(tmp_path / "a.tif")


def test_grey_beside_alpha_can_be_taken(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([GREY8, 255 - GREY8]), "LA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(whole(tmp_path / "a.png", channel=0), GREY8)
    np.testing.assert_array_equal(whole(tmp_path / "a.png", channel=1), 255 - GREY8)
    with pytest.raises(DataError, match=r"transparent pixels; .* 2 channels \(0 grey, 1 alpha\) with --channel N"):
        whole(tmp_path / "a.png")


def test_16_bit_colour_png_is_refused_because_the_decoder_would_cut_it_to_8_bit(tmp_path: Path) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([GREY16] * 3))
    with pytest.raises(DataError, match="16-bit colour"):
        whole(tmp_path / "a.png")


# Channels and planes


def channel_files(folder: Path) -> list[Path]:
    return [
        save_tiff(folder / "ome.ome.tif", CHANNELS, metadata={"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP"]}}),
        save_tiff(folder / "imagej.tif", CHANNELS, imagej=True, metadata={"axes": "CYX"}),
        save_tiff(folder / "tiled.ome.tif", CHANNELS, metadata={"axes": "CYX"}, tile=(16, 16), compression="zlib"),
        save_tiff(folder / "samples.tif", np.moveaxis(CHANNELS, 0, -1), planarconfig="contig", metadata=None),
        save_zarr(folder / "a.zarr", CHANNELS, "cyx"),
    ]


def test_a_channel_is_chosen_by_its_number_and_never_guessed(tmp_path: Path) -> None:
    for path in channel_files(tmp_path):
        for channel in (0, 1):
            np.testing.assert_array_equal(whole(path, channel=channel), CHANNELS[channel], err_msg=path.name)
        with pytest.raises(DataError, match=r"has 2 channels.* where one is needed; .*--channel N, counted"):
            whole(path)
        for channel in (2, -1):
            with pytest.raises(DataError, match=rf"has no channel {channel} but 2 channels.*\(0 to 1\)"):
                whole(path, channel=channel)
    with pytest.raises(DataError, match=r"2 channels \(0 DAPI, 1 GFP\)"):
        whole(tmp_path / "ome.ome.tif")


def test_a_tiff_is_known_by_its_contents(tmp_path: Path) -> None:
    path = save_tiff(tmp_path / "a.img", CHANNELS, imagej=True, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(whole(path, channel=1), CHANNELS[1])


def test_the_only_channel_is_number_0(tmp_path: Path) -> None:
    path = save_tiff(tmp_path / "a.tif", GREY8)
    np.testing.assert_array_equal(whole(path, channel=0, plane=0), GREY8)
    np.testing.assert_array_equal(whole(path, plane="mean"), GREY8)
    with pytest.raises(DataError, match="no channel 1 but 1 channel;"):
        whole(path, channel=1)
    with pytest.raises(DataError, match="no plane 1 but 1 plane;"):
        whole(path, plane=1)


def stack_files(folder: Path) -> list[tuple[Path, str]]:
    return [
        (save_tiff(folder / "pages.tif", STACK, metadata=None), "5 planes"),
        (save_tiff(folder / "packed.tif", STACK, compression="zlib", tile=(16, 16)), "5 planes"),
        (save_tiff(folder / "ome.ome.tif", STACK, metadata={"axes": "ZYX"}), r"5 slices \(Z\)"),
        (save_tiff(folder / "imagej.tif", STACK, imagej=True, metadata={"axes": "TYX"}), r"5 time points \(T\)"),
        (save_zarr(folder / "a.zarr", STACK[:, None], "tcyx"), r"5 time points \(T\)"),
    ]


@pytest.mark.parametrize("by_windows", [False, True])
def test_a_plane_of_a_stack_or_its_projection(tmp_path: Path, by_windows: bool, request: pytest.FixtureRequest) -> None:
    if by_windows:
        request.getfixturevalue("windows")
    for path, counted in stack_files(tmp_path):
        np.testing.assert_array_equal(whole(path, plane=3), STACK[3], err_msg=path.name)
        np.testing.assert_array_equal(whole(path, plane="max"), STACK.max(axis=0), err_msg=path.name)
        np.testing.assert_array_equal(whole(path, plane="mean"), np.rint(STACK.mean(axis=0)), err_msg=path.name)
        with pytest.raises(DataError, match=rf"{counted} where one plane is needed; .*--plane N.*--plane max"):
            whole(path)
        with pytest.raises(DataError, match=rf"no plane 5 but {counted}; --plane is counted from 0 \(0 to 4\)"):
            whole(path, plane=5)


def test_the_mean_of_floats_is_not_rounded(tmp_path: Path) -> None:
    pixels = STACK.astype(np.float32) / 3
    mean_HW = whole(save_tiff(tmp_path / "a.tif", pixels), plane="mean")
    assert mean_HW.dtype == np.float32
    np.testing.assert_allclose(mean_HW, pixels.mean(axis=0), rtol=1e-6)


def test_slices_and_time_points_together_are_refused(tmp_path: Path) -> None:
    pixels = np.zeros((3, 4, 8, 9), np.uint8)
    path = save_tiff(tmp_path / "a.ome.tif", pixels, metadata={"axes": "TZYX"})
    with pytest.raises(
        DataError, match=r"3 time points \(T\) and 4 slices \(Z\), too many to choose from by one number; save one"
    ):
        whole(path, plane=0)


def test_a_channel_of_a_plane(tmp_path: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (3, 2, 40, 60), dtype=np.uint8)
    path = save_tiff(tmp_path / "a.tif", pixels, imagej=True, metadata={"axes": "ZCYX"})
    np.testing.assert_array_equal(whole(path, channel=1, plane=2), pixels[2, 1])
    np.testing.assert_array_equal(whole(path, channel=0, plane="max"), pixels[:, 0].max(axis=0))


# Pixel size


@pytest.mark.parametrize(
    ("options", "size_um"),
    [
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm"}}, 0.325),
        ({"ome": True, "metadata": {"PhysicalSizeX": 325, "PhysicalSizeXUnit": "nm"}}, 0.325),
        ({"ome": True}, None),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "micron"}}, 0.25),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "pixel"}}, None),
        ({"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (28, 28), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": (118.11, 118.11), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": (20000, 20000), "resolutionunit": "INCH"}, None),
        ({}, None),
    ],
    ids=["OME um", "OME nm", "OME", "ImageJ um", "ImageJ pixel", "cm", "72 dpi", "300 dpi", "inch", "nothing"],
)
def test_pixel_size_where_the_file_says_so(tmp_path: Path, options: dict[str, Any], size_um: float | None) -> None:
    with open_source(save_tiff(tmp_path / "a.tif", GREY8, **options)) as source:
        assert source.pixel_size_um == (size_um if size_um is None else pytest.approx(size_um))


OME_UM = {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}


def sized_files(folder: Path, height: float) -> list[Path]:
    """Pixels 0.5 um wide and so high."""
    unit = {"resolutionunit": "CENTIMETER"}
    scale = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [height, 0.5]}]}]
    return [
        save_tiff(folder / "a.ome.tif", GREY8, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": height, **OME_UM}),
        save_tiff(folder / "b.tif", GREY8, imagej=True, resolution=(2, 1 / height), metadata={"unit": "um"}),
        save_tiff(folder / "c.tif", GREY8, resolution=(20000, 10000 / height), **unit),
        save_zarr(folder / "d.zarr", GREY8, "yx", datasets=scale),
    ]


def test_pixels_that_are_not_square_have_no_size(tmp_path: Path) -> None:
    for path in sized_files(tmp_path, 0.65):
        with open_source(path) as source:
            assert source.pixel_size_um is None, path
            assert source.notices == (
                "Pixels are 0.5 um wide and 0.65 um high, so nothing is given in um; --pixel-size UM takes them for "
                "square.",
            )
        with open_source(path, pixel_size_um=0.5) as source:
            assert (source.pixel_size_um, source.notices) == (0.5, ())


def test_a_height_that_is_rounded_otherwise_is_the_same(tmp_path: Path) -> None:
    for path in sized_files(tmp_path, 0.504):
        with open_source(path) as source:
            assert (source.pixel_size_um, source.notices) == (pytest.approx(0.5), ())


# Microscope makers' formats


@pytest.mark.parametrize("suffix", [".czi", ".nd2", ".lif"])
def test_without_the_extra_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setitem(sys.modules, "bioio", None)  # as if it were not installed, where it is
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"anything")
    with pytest.raises(DataError, match=rf"a{suffix} is in a .*; .* pip install 'nuciseg\[vendor\]'"):
        whole(path)


def test_czi(tmp_path: Path) -> None:
    czi = pytest.importorskip("pylibCZIrw.czi", reason="needs the extra 'vendor'")
    path = tmp_path / "a.czi"
    with czi.create_czi(str(path)) as document:
        for channel, pixels_HW in enumerate(CHANNELS):
            document.write(data=pixels_HW[..., None], plane={"C": channel})
        document.write_metadata(
            document_name="a", channel_names={0: "DAPI", 1: "GFP"}, scale_x=0.25e-6, scale_y=0.25e-6
        )
    with open_source(path, channel=1) as source:
        assert (source.shape, source.dtype, source.pixel_size_um) == ((40, 60), np.uint16, pytest.approx(0.25))
        np.testing.assert_array_equal(source.read(3, 5, 20, 30), CHANNELS[1, 3:23, 5:35])
    with pytest.raises(DataError, match=r"2 channels \(0 DAPI, 1 GFP\)"):
        whole(path)


def test_a_damaged_czi_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bioio_czi", reason="needs the extra 'vendor'")
    (tmp_path / "a.czi").write_bytes(b"ZISRAWFILE" + bytes(500))
    with pytest.raises(DataError, match=r"a\.czi is damaged, or its reader is missing"):
        whole(tmp_path / "a.czi")
