"""A network as a bioimage.io model: a zip that ilastik, deepImageJ and others of that community run.

The description (https://bioimage.io, model format 0.5) has a step for scaling between percentiles and one for clipping,
not for zeroed background and drawn border as marks (`data.normalization.ignore_extremes`). A network that knows them is
misled: on 20 drawn clusters the shipped separator's foreground had an IoU of 0.99 with the truth as nuciseg normalises
and 0.61 as its package does. The package passes the format's test all the same, so its README and the command say it.
Its percentiles are interpolated between two neighbouring values of the image, ours of integers are one of them.

Nothing is fetched: the description names no address and no account, and all its files lie beside it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from packaging.version import Version
from pydantic import ValidationError

from nuciseg.data.dataset import NORMALIZED_RANGE, NormalizationConfig, normalize, round_up
from nuciseg.data.markings import with_marking
from nuciseg.data.synthetic import SyntheticConfig, draw_cluster
from nuciseg.engine.exporting import (
    INPUT_NAME,
    ONNX_PACKAGES,
    OPSET,
    OUTPUT_NAME,
    OnnxModel,
    ProbabilityModel,
    describe,
    require_packages,
    run_model,
)
from nuciseg.engine.network import Network
from nuciseg.errors import CheckpointError, ConfigError, ResourceError, writing
from nuciseg.images import write_png
from nuciseg.plots import overlay_rgb

if TYPE_CHECKING:
    from bioimageio.spec.model import v0_5

EPSILON = 1e-6  # what the format adds to the width of the range between the percentiles
# Of the size and with the marks that the shipped separator was trained on.
_EXAMPLE = SyntheticConfig(mean_diameter_px=70.0, nuclei_per_cluster=(3, 3))


@dataclass(frozen=True)
class Credits:
    """Who and what a package names: `license` is an SPDX identifier, `card` a text in Markdown on the weights."""

    title: str
    card: str
    authors: Sequence[str] = ()
    license: str | None = None


def pack_for_model_zoo(network: Network, onnx: OnnxModel, credits: Credits) -> tuple[bytes, str]:
    """The zip, and bioimage.io's word on it: it has passed `bioimageio.core.test_model`.

    `onnx` is `export_onnx` of the same network. Raises ResourceError where packages are missing or there is no room,
    ConfigError where the credits cannot be used, CheckpointError where the test is not passed.
    """
    require_model_zoo_packages()
    _refuse_unknown_license(credits.license)
    import bioimageio.core
    from bioimageio.spec import save_bioimageio_package
    from loguru import logger

    logger.disable("bioimageio")  # it reports each step; what matters is in the summary
    with tempfile.TemporaryDirectory(prefix="nuciseg-export-") as name, writing(Path(name)):
        folder, package = Path(name), Path(name) / "package.zip"
        _write_files(network, onnx, credits, folder)
        save_bioimageio_package(_description(network, credits, folder), output_path=package)
        summary = bioimageio.core.test_model(package)
        if summary.status != "passed":
            reasons = [error.msg for detail in summary.details for error in detail.errors]
            reason = " ".join((reasons or [summary.status])[0].split())
            raise CheckpointError(f"the package does not pass bioimage.io's own test: {reason}")
        num_tests = sum(detail.status == "passed" for detail in summary.details)
        said = f"{summary.status} ({num_tests} checks of bioimageio.core {bioimageio.core.__version__})"
        return package.read_bytes(), said


def require_model_zoo_packages() -> None:
    """See that the packages which a model package needs are installed, and fit. Raises ResourceError."""
    require_packages([*ONNX_PACKAGES, "bioimageio.core"])
    spec, pydantic = version("bioimageio.spec"), version("pydantic")
    # https://github.com/pydantic/pydantic/pull/13506 refuses a call that bioimageio.spec makes before 0.5.14.
    if Version(spec) < Version("0.5.14") and Version(pydantic) >= Version("2.14"):
        raise ResourceError(f"bioimageio.spec {spec} fails with pydantic {pydantic}: pip install 'pydantic<2.14'")


def _refuse_unknown_license(name: str | None) -> None:
    from bioimageio.spec.generic.v0_3 import LicenseId

    try:
        LicenseId(name) if name is not None else None
    except ValidationError:
        raise ConfigError(f"{name!r} is not the SPDX identifier of a licence; give one as CC-BY-4.0 or MIT") from None


def scale_range(image_BCHW: NDArray[np.float32], config: NormalizationConfig) -> NDArray[np.float32]:
    """What the package's preprocessing makes of raw intensities: as `normalize` does, but zeros and saturated pixels
    count among the percentiles and are no marks."""
    percentiles = [config.low_percentile, config.high_percentile]
    low, high = np.percentile(image_BCHW, percentiles, axis=(1, 2, 3), keepdims=True)
    scaled_BCHW = (image_BCHW - low) / (high - low + EPSILON)
    return np.asarray(np.clip(scaled_BCHW, *NORMALIZED_RANGE), np.float32)


def _example(stride: int) -> NDArray[np.uint8]:
    """A drawn cluster (H, W) on a black square whose side is a multiple of `stride`."""
    image_HW = draw_cluster(_EXAMPLE, np.random.SeedSequence(0)).image_HWC[..., 0]
    side = round_up(max(image_HW.shape), stride)
    square_HW = np.zeros((side, side), np.uint8)
    square_HW[: image_HW.shape[0], : image_HW.shape[1]] = image_HW
    return square_HW


def _write_files(network: Network, onnx: OnnxModel, credits: Credits, folder: Path) -> None:
    image_HW = _example(network.stride)
    raw_BCHW = np.repeat(image_HW[None, None].astype(np.float32), network.in_channels, axis=1)
    normalized_BCHW = scale_range(raw_BCHW, network.config.data.normalization)
    (folder / "weights.onnx").write_bytes(onnx.data)
    np.save(folder / "test_input.npy", raw_BCHW)
    model = ProbabilityModel(network.model).eval()
    np.save(folder / "test_output.npy", run_model(model, normalized_BCHW))
    own_HWC = normalize(
        with_marking(image_HW[..., None], network.config.data.marking), network.config.data.normalization
    )
    own_BCHW = np.repeat(own_HWC.transpose(2, 0, 1)[None], network.in_channels, axis=1)
    labels_HW = network.target.decode(run_model(model, own_BCHW)[0]).labels_HW
    pictures = [overlay_rgb(image_HW, each_HW, scale=2) for each_HW in (np.zeros_like(labels_HW), labels_HW)]
    write_png(folder / "cover.png", np.hstack(pictures))
    (folder / "README.md").write_text(f"{credits.card.rstrip()}\n\n{_instructions(network)}", encoding="utf-8")


def _description(network: Network, credits: Credits, folder: Path) -> v0_5.ModelDescr:
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.model import v0_5

    config = network.config.data.normalization
    image, maps = v0_5.TensorId(INPUT_NAME), v0_5.TensorId(OUTPUT_NAME)
    rows, columns, channel = v0_5.AxisId("y"), v0_5.AxisId("x"), v0_5.AxisId("channel")
    sizes = v0_5.ParameterizedSize(min=network.stride, step=network.stride)
    scaling = v0_5.ScaleRangeKwargs(
        axes=(channel, rows, columns),
        min_percentile=config.low_percentile,
        max_percentile=config.high_percentile,
        eps=EPSILON,
    )
    names = ["grey"] if network.in_channels == 1 else [f"channel{number}" for number in range(network.in_channels)]
    input_ = v0_5.InputTensorDescr(
        id=image,
        description="raw intensities; sides are multiples of the network's stride",
        axes=[
            v0_5.BatchAxis(),
            v0_5.ChannelAxis(channel_names=names),
            *(v0_5.SpaceInputAxis(id=axis, size=sizes) for axis in (rows, columns)),
        ],
        data=v0_5.IntervalOrRatioDataDescr(type="float32"),
        preprocessing=[
            v0_5.ScaleRangeDescr(kwargs=scaling),
            v0_5.ClipDescr(kwargs=v0_5.ClipKwargs(min=NORMALIZED_RANGE[0], max=NORMALIZED_RANGE[1])),
        ],
        test_tensor=FileDescr(source=folder / "test_input.npy"),
    )
    output = v0_5.OutputTensorDescr(
        id=maps,
        description="probabilities, one channel a map",
        axes=[
            v0_5.BatchAxis(),
            v0_5.ChannelAxis(channel_names=list(network.target.map_names)),
            *(
                v0_5.SpaceOutputAxis(id=axis, size=v0_5.SizeReference(tensor_id=image, axis_id=axis))
                for axis in (rows, columns)
            ),
        ],
        data=v0_5.IntervalOrRatioDataDescr(type="float32", range=(0.0, 1.0)),
        test_tensor=FileDescr(source=folder / "test_output.npy"),
    )
    weights = v0_5.OnnxWeightsDescr(source=folder / "weights.onnx", opset_version=OPSET)
    return v0_5.ModelDescr(
        name=re.sub(r"[^\w+\- ()]", "_", credits.title, flags=re.ASCII)[:128],
        description="Separates touching cell nuclei in fluorescence microscopy: probabilities of "
        f"{', '.join(network.target.map_names)}.",
        authors=[v0_5.Author(name=name) for name in credits.authors],
        license=credits.license,
        documentation=FileDescr(source=folder / "README.md"),
        covers=[FileDescr(source=folder / "cover.png")],
        tags=["nuclei", "instance-segmentation", "fluorescence-light-microscopy", "2d", "unet", "pytorch"],
        inputs=[input_],
        outputs=[output],
        weights=v0_5.WeightsDescr(onnx=weights),
        config=v0_5.Config.model_validate({"nuciseg": describe(network)}),
    )


def _instructions(network: Network) -> str:
    about: dict[str, Any] = describe(network)
    normalization = network.config.data.normalization
    extremes = (
        " The network was trained with zeroed background and saturated pixels as marks: left out of the percentiles, "
        f"then set to {NORMALIZED_RANGE[0]:g} and {NORMALIZED_RANGE[1]:g} (`ignore_extremes`). The description of this "
        "package cannot say so: where images have such pixels, as cut-out clusters do, its preprocessing misleads the "
        "network, which may take background for nuclei. For those, normalise as said here and run `weights.onnx`."
        if normalization.ignore_extremes
        else ""
    )
    return f"""\
## This package

`weights.onnx` (opset {OPSET}) takes normalised images, float32 (batch, channel, y, x), y and x multiples of \
{network.stride}, and gives probabilities of {", ".join(network.target.map_names)}. Before it, percentile \
{normalization.low_percentile:g} of an image becomes 0 and percentile {normalization.high_percentile:g} becomes 1, \
limited to {NORMALIZED_RANGE[0]:g} ... {NORMALIZED_RANGE[1]:g}.{extremes}

Nuclei are not in the graph: nuciseg {about["nuciseg_version"]} decodes them from these maps with

```json
{json.dumps(about["decode"], indent=1)}
```

The test images and the cover are drawn by nuciseg's simulator; the outlines on the cover are what \
this network found in nuciseg, which normalises as it was trained.

## Validation

`bioimageio test FILE` repeats the test that this package passed. Scores on labelled images: \
`python -m nuciseg.evaluate --checkpoint CHECKPOINT --data.root DIR`.
"""
