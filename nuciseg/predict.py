"""Find the nuclei of images of any size: labels, a picture, measurements, and what ImageJ and QuPath read.

python -m nuciseg.predict images --out nuclei
python -m nuciseg.predict slide.ome.tif --channel 0 --diameter 8um --rois --geojson --out nuclei
python -m nuciseg.predict --checkpoint nuciseg/separator clusters/*.png --out labels

In Python: `nuciseg.predict(image)`.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import math
import os
import sys
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuciseg.cli import Parser, folder_or_bucket, run_verb
from nuciseg.engine.shipped import describe_shipped
from nuciseg.errors import ConfigError, DataError, StoppedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nuciseg.engine.files import FileResult, Request
    from nuciseg.types import Instances

# torch and all that needs it are imported where they are used, so that --help answers at once.

DEFAULT_CHECKPOINT = "nuciseg/fields"
BY_DEFAULT = ("masks", "overlay", "measurements")
OUTPUTS = {
    "masks": "STEM_masks.tif: labels, int32, rows x columns as the image, 0 background, nuclei 1 to N",
    "overlay": "STEM_overlay.png: the image with its nuclei outlined; small images enlarged, large ones reduced",
    "measurements": "STEM_measurements.csv: size, place, shape, intensity and confidence of each nucleus",
    "rois": "STEM_rois.zip: outlines as regions of interest for ImageJ",
    "geojson": "STEM.geojson: outlines and measurements for QuPath",
}

DESCRIPTION = """\
Find the nuclei of images: whole microscope fields and slides, or with --checkpoint nuciseg/separator clusters that were
cut out on black. No training is needed.

For each image STEM.* (NAME.zarr/0: STEM is NAME_0) the files below are written to --out; summary.csv has one row an
image, predict.json what they were predicted with. An image that cannot be used is reported and left out, and the exit
code is 2.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Predict all inputs; raises NucisegError, for an image that could not be predicted after all others are done."""
    args = _parser().parse_args(argv)
    request = _request(args)
    paths, left_out = expand_inputs(args.input, args.out)
    _refuse_to_overwrite(paths, request)

    from nuciseg.distributed.failures import sigterm_raises
    from nuciseg.distributed.mirror import fetched_checkpoint
    from nuciseg.engine.batch import Batch, settings_of
    from nuciseg.images import require_writable

    checkpoint = fetched_checkpoint(args.checkpoint)
    require_writable(args.out)
    batch = Batch(args.out, settings_of(checkpoint, request), map(str, paths))
    batch.refuse_results_of_others()
    if args.resume:
        batch.resume(request)
    if left_out:
        what = "label image or overlay that lies beside its image"
        if len(left_out) > 1:
            what = "label images and overlays that lie beside their images"
        print(f"left out: {len(left_out)} {what}, such as {left_out[0]}")
    pending = [path for path in paths if not batch.is_done(str(path))]
    if len(pending) < len(paths):
        print(f"{len(paths) - len(pending)} of {len(paths)} images were finished before")
    doubtful = 0
    with sigterm_raises(StoppedError("asked to stop; what was finished is kept, and --resume goes on")):
        try:
            with contextlib.closing(_predicted(pending, checkpoint, request, args.workers)) as results:
                for result in results:
                    batch.add(result.row)
                    doubtful += bool(result.num_open_borders)
                    if result.row.summary is not None or len(paths) > 1:
                        _say(result)
        finally:
            batch.save()
    rows = batch.rows()
    done = [row.summary for row in rows if row.summary is not None]
    num_nuclei = sum(summary.num_nuclei for summary in done)
    print(f"{num_nuclei} nuclei in {len(done)} images, written to {args.out} (checkpoint {checkpoint})")
    if doubtful:
        print(f"images whose borders do not close, flagged above, may be cut wrongly: {doubtful}")
    failed = [row for row in rows if row.summary is None]
    if failed and len(paths) == 1:
        raise DataError(failed[0].reason)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(paths)} images could not be predicted (reasons above); the rest is done"
        )


def predict(
    image_HW: NDArray[np.generic], *, checkpoint: Path | str = DEFAULT_CHECKPOINT, diameter_px: float | None = None
) -> Instances:
    """The nuclei of one grey image (H, W): `labels_HW` int32, 0 background, 1..N, and `confidences_N` float32.

    Any number type and size; `diameter_px`, the typical diameter of a nucleus in pixels, is estimated where it is not
    given. `checkpoint` is the name of weights that come with nuciseg, or the folder of a run. Loaded once, a network is
    kept for the next image. Raises DataError, ConfigError for a diameter below one pixel, CheckpointError.
    """
    import numpy as np

    from nuciseg.engine.files import LEAST_DIAMETER_PX
    from nuciseg.engine.prediction import loaded_predictor, refuse_unusable

    try:
        image_HW = np.asarray(image_HW)
    except ValueError:
        raise DataError("rows of an image must all be of one length; give one grey plane of numbers") from None
    refuse_unusable(image_HW)
    if diameter_px is not None and not LEAST_DIAMETER_PX <= diameter_px < math.inf:
        raise ConfigError(f"diameter_px {diameter_px:g} is no size; give the width of a nucleus in pixels, such as 30")
    return loaded_predictor(Path(checkpoint)).instances(image_HW, diameter_px=diameter_px)


def _predicted(
    paths: list[Path], checkpoint: Path, request: Request, num_workers: int
) -> Generator[FileResult, None, None]:
    from nuciseg.distributed.prediction import predict_files

    num_done = 0
    with _progress(len(paths)) as show:
        results = predict_files(
            paths, checkpoint, request, num_workers=num_workers, on_share=lambda share: show(num_done + share)
        )
        for result in results:
            num_done += 1
            show(num_done)
            yield result


@contextlib.contextmanager
def _progress(num_images: int) -> Iterator[Callable[[float], None]]:
    """Takes how many images are done, and shows it on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else lines that go to a file would land on the terminal
        disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=num_images)
        yield lambda num_done: bar.update(task, completed=num_done)


def expand_inputs(inputs: Iterable[str], out: Path) -> tuple[list[Path], list[Path]]:
    """The image files that `inputs` (files, folders, patterns) name, each once, in order; a link goes by its own name.
    And the files of folders that were left out because they are results of images beside them.

    Raises DataError for an input that names none, for two files whose results would have the same name, and where a
    folder is also the one to write to: a second run would take the first one's results for images.
    """
    paths: dict[tuple[str, str], Path] = {}
    left_out: dict[tuple[str, str], Path] = {}
    for each in inputs:
        found, results = _files_of(each, out)
        if not found:
            raise DataError(f"{each} names no image; give an image file, a folder of images or a pattern")
        for path in found:
            paths.setdefault(_identity(path), path)
        for path in results:
            left_out.setdefault(_identity(path), path)
    by_stem: dict[str, Path] = {}
    for (_, stem), path in paths.items():
        other = by_stem.setdefault(stem, path)
        if other != path:
            raise DataError(
                f"{other} and {path} would both become {stem}_masks.tif; predict them separately, with different --out"
            )
    return list(paths.values()), [left_out[key] for key in left_out if key not in paths]


def _identity(path: Path) -> tuple[str, str]:
    from nuciseg.outputs import stem_of

    return os.path.realpath(path), stem_of(path)


def _results_among(paths: list[Path]) -> set[Path]:
    """Label images as Cellpose and nuciseg name them, and nuciseg's overlays, where their image is there, too."""
    from nuciseg.data.formats.cellpose import IMAGE_ENDING, MASKS_ENDINGS

    stems = {path.stem for path in paths}
    return {
        path
        for path in paths
        for ending in (*MASKS_ENDINGS, *(("_overlay",) if path.suffix == ".png" else ()))
        if path.stem.endswith(ending) and stems & {name := path.stem.removesuffix(ending), name + IMAGE_ENDING}
    }


def _refuse_to_overwrite(paths: Iterable[Path], request: Request) -> None:
    from nuciseg.outputs import output_files, stem_of

    inputs = {os.path.realpath(path) for path in paths}
    for path in paths:
        for name in output_files(request.outputs, stem_of(path)):
            if os.path.realpath(request.out / name) in inputs:
                raise DataError(f"{request.out / name} is to be read and would be overwritten; choose another --out")


def _files_of(text: str, out: Path) -> tuple[list[Path], list[Path]]:
    """The images, and where it is a folder the results among its files."""
    path = Path(text)
    if path.is_dir() and not _is_image(path):
        if path.resolve() == out.resolve():
            raise DataError(f"--out {out} is the folder of the images; choose another for the results")
        found = sorted(each for each in path.iterdir() if _is_image(each))
        results = _results_among(found)
        return [each for each in found if each not in results], sorted(results)
    if path.exists():
        return [path], []
    return sorted(each for each in map(Path, glob.glob(text, recursive=True)) if _is_image(each)), []


def _is_image(path: Path) -> bool:
    from nuciseg.sources import SOURCE_SUFFIXES
    from nuciseg.sources.ome_zarr import is_ome_zarr

    if path.name.startswith("."):
        return False
    is_zarr = path.suffix.lower() == ".zarr"
    if path.is_dir():  # what lies within an image, its labels for instance, is none
        return is_zarr or (is_ome_zarr(path) and not any(map(is_ome_zarr, path.parents)))
    is_broken_link = path.is_symlink() and not path.exists()  # to be reported, not passed over
    return path.suffix.lower() in SOURCE_SUFFIXES and (is_broken_link or (path.is_file() and not is_zarr))


def _request(args: argparse.Namespace) -> Request:
    from nuciseg.engine.files import Diameter, Request

    outputs = tuple(name for name in OUTPUTS if getattr(args, name))
    if not outputs:
        raise ConfigError(f"nothing is to be written; leave one of {', '.join(f'--{name}' for name in OUTPUTS)} on")
    if args.pixel_size is not None and not (args.pixel_size > 0 and math.isfinite(args.pixel_size)):
        raise ConfigError(
            f"--pixel-size {args.pixel_size:g} is no size; give the width of a pixel in um, such as 0.325"
        )
    return Request(
        outputs=outputs,  # type: ignore[arg-type]  # the keys of OUTPUTS are OutputNames; a test compares them
        out=args.out,
        channel=args.channel,
        plane=args.plane,
        diameter=Diameter.parse(args.diameter) if args.diameter is not None else None,
        pixel_size_um=args.pixel_size,
        allow_large=args.allow_large,
        tile_px=args.tile_px,
    )


def _say(result: FileResult) -> None:
    row = result.row
    if row.summary is None:
        print(f"nuciseg: {row.reason}", file=sys.stderr)
        return
    size = (
        ""
        if row.diameter_px is None
        else f", {'estimated ' if result.estimated else ''}diameter {row.diameter_px:.0f} px"
    )
    flag = f", open borders: {result.num_open_borders}, look at it" if result.num_open_borders else ""
    print(f"{row.file}: {row.summary.num_nuclei} nuclei{size}{flag}")
    for notice in result.notices:
        print(f"  {notice}")


def _plane(text: str) -> int | str:
    if text in ("max", "mean"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no plane: give its number from 0, max or mean")
    return int(text)


def _whole(least: int, multiple: int = 1) -> Any:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least or int(text) % multiple:
            of = f" that {multiple} divides" if multiple > 1 else ""
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least {least}{of}")
        return int(text)

    return whole


def _parser() -> argparse.ArgumentParser:
    parser = Parser("predict", DESCRIPTION, usage="%(prog)s INPUT... [--out DIR] [--checkpoint PATH] [options]")
    parser.add_argument(
        "input", nargs="+", metavar="INPUT",
        help="image file, folder of images or quoted pattern: TIFF, OME-TIFF, PNG, JPEG, OME-Zarr; CZI, ND2 and LIF "
        "with the extra nuciseg[vendor]; 8 to 16 bit or float, of any size",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=folder_or_bucket, default=Path(DEFAULT_CHECKPOINT), metavar="PATH",
        help="a run's folder, s3:// and gs:// too (its best checkpoint is taken), one checkpoint's, or the name of "
        "weights that come with "
        f"nuciseg: {describe_shipped()} (path or name, default: {DEFAULT_CHECKPOINT})",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="DIR",
        help="folder for the results; files of the same name are replaced (path, default: predictions)",
    )  # fmt: skip
    for name, text in OUTPUTS.items():
        parser.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=name in BY_DEFAULT,
            help=f"{text} (default: {'on' if name in BY_DEFAULT else 'off'})",
        )  # fmt: skip
    parser.add_argument(
        "--diameter", metavar="SIZE",
        help="typical diameter of a nucleus: 30 or 30px in pixels, 8um in micrometres (default: estimated)",
    )  # fmt: skip
    parser.add_argument(
        "--pixel-size", type=float, metavar="UM",
        help="side of a pixel in micrometres (default: what the file says, nothing where pixels are not square)",
    )  # fmt: skip
    parser.add_argument("--channel", type=_whole(0), metavar="N", help="which channel, from 0, where there are several")
    parser.add_argument(
        "--plane", type=_plane, metavar="N",
        help="which plane of a stack, from 0; max or mean: all planes projected",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=_whole(1), default=1, metavar="N",
        help="so many networks at a time, as Ray actors on this machine or the cluster (default: 1, without Ray)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="leave out images that summary.csv in --out has as done")
    parser.add_argument(
        "--allow-large", action="store_true", help="read images that claim more than a gigapixel, whole if need be"
    )
    parser.add_argument(
        "--tile-px", type=_whole(256, 256), default=2048, metavar="N",
        help="side of the tiles that the network sees, a multiple of 256; smaller takes less memory, but nuclei beside "
        "a seam may come out otherwise (default: 2048)",
    )  # fmt: skip
    return parser


class _CallableModule(types.ModuleType):
    """`nuciseg.predict` is this module, which `python -m` runs, and the function that it is named after."""

    def __call__(self, *args: Any, **kwargs: Any) -> Instances:
        return predict(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    run_verb(main)
