"""A network as ONNX, for programs that know no PyTorch, and the proof that it still answers as it did.

What is exported ends with probabilities. How an image is normalised before and how nuclei are decoded after is no part
of the graph; its numbers stand in the file's metadata.

The exporter is PyTorch's older one, which traces. The newer (`dynamo=True`) wants onnxscript, takes seconds for
networks that this one exports in tenths, and did not finish the shipped separator (EfficientNet-Lite0) in two minutes.
A trace may hold a constant that belongs to the traced size, so the file is compared with PyTorch at other sizes before
it is kept.
"""

from __future__ import annotations

import importlib
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nuciseg import __version__
from nuciseg.data.dataset import NORMALIZED_RANGE
from nuciseg.engine.network import Network
from nuciseg.errors import CheckpointError, ResourceError

ONNX_PACKAGES = ("onnx", "onnxruntime")
OPSET = 17  # of 2022: everything in here is older, and most runtimes in use know it
INPUT_NAME, OUTPUT_NAME = "images", "probabilities"
MAX_DIFFERENCE = 1e-4  # of a probability; float32 kernels of different libraries differ by about 1e-6
# In strides. None is the traced one, and odd multiples show paddings that were fixed for even ones.
_TRACED, _CHECKED = (2, 3, 4), ((1, 5, 3), (2, 5, 3), (1, 2, 7), (2, 2, 7))


@dataclass(frozen=True)
class OnnxModel:
    """A checked ONNX file: its bytes, and how far its probabilities were from PyTorch's at most."""

    data: bytes
    max_difference: float


class ProbabilityModel(nn.Module):
    """Normalised images (B, C, H, W) float32 to probabilities (B, K, H, W) float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        probabilities_BKHW: torch.Tensor = self.model(images_BCHW).sigmoid()
        return probabilities_BKHW


def require_packages(names: Sequence[str]) -> None:
    """See that the packages which exporting needs are installed. Raises ResourceError that says how to get them."""
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ResourceError(f"export needs {' and '.join(missing)}: pip install 'nuciseg[export]'")


def export_onnx(network: Network) -> OnnxModel:
    """The network, which must be on the CPU, as ONNX of opset 17.

    Input `images` (B, C, H, W) float32, normalised; B, H and W are free, H and W multiples of `network.stride`. Output
    `probabilities` (B, K, H, W) float32 in [0, 1], maps as in `network.target.map_names`. Raises ResourceError where
    packages are missing, CheckpointError where the network cannot be exported or answers differently.
    """
    require_packages(ONNX_PACKAGES)
    model = ProbabilityModel(network.model).eval()
    data = _with_metadata(_traced(model, network), describe(network))
    return OnnxModel(data, _compared(model, network, data))


def describe(network: Network) -> dict[str, Any]:
    """What one must know to use the exported network, JSON values: `metadata_props` of the file holds them as JSON."""
    data = network.config.data
    return {
        "nuciseg_version": __version__,
        "stride": network.stride,
        "map_names": list(network.target.map_names),
        "normalization": {**data.normalization.model_dump(mode="json"), "range": list(NORMALIZED_RANGE)},
        "marking": data.marking,
        "target": network.config.target.model_dump(mode="json", exclude={"decode"}),
        "decode": network.config.target.decode.model_dump(mode="json"),
        "inference": network.config.inference.model_dump(mode="json"),
    }


def run_model(model: nn.Module, images_BCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """PyTorch's answer in float32, whatever precision the network predicts in."""
    with torch.inference_mode():
        answer: NDArray[np.float32] = model(torch.from_numpy(images_BCHW)).numpy()
    return answer


def _traced(model: nn.Module, network: Network) -> bytes:
    buffer = io.BytesIO()
    free = {0: "batch", 2: "height", 3: "width"}
    try:
        with warnings.catch_warnings():
            # That it is the older exporter, and that sizes are constants to the tracer: see this module's docstring.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (torch.from_numpy(_noise(network, _TRACED)),),
                buffer,  # type: ignore[arg-type]  # the older exporter takes files too
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_axes={INPUT_NAME: free, OUTPUT_NAME: free},
            )
    except torch.onnx.OnnxExporterError as error:
        raise CheckpointError(f"{_called(network)} cannot be written as ONNX: {_first_line(error)}") from error
    return buffer.getvalue()


def _with_metadata(data: bytes, metadata: dict[str, Any]) -> bytes:
    import onnx

    model = onnx.load_model_from_string(data)
    model.producer_name, model.producer_version = "nuciseg", __version__
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _compared(model: nn.Module, network: Network, data: bytes) -> float:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    differences = []
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        for batch in _CHECKED:
            images_BCHW = _noise(network, batch)
            (found_BKHW,) = session.run([OUTPUT_NAME], {INPUT_NAME: images_BCHW})
            differences.append(float(np.abs(found_BKHW - run_model(model, images_BCHW)).max()))
    except (errors.Fail, errors.InvalidArgument, errors.RuntimeException, errors.NotImplemented, ValueError) as error:
        raise CheckpointError(f"{_called(network)} does not run as ONNX: {_first_line(error)}") from error
    if not max(differences) < MAX_DIFFERENCE:  # NaN included
        raise CheckpointError(
            f"{_called(network)} answers differently as ONNX, by up to {max(differences):.2g} of a probability where "
            f"{MAX_DIFFERENCE:g} is allowed: it cannot be exported; train one with another model.encoder"
        )
    return max(differences)


def _noise(network: Network, batch: tuple[int, int, int]) -> NDArray[np.float32]:
    """Images in the range of normalised ones, the same each time; `batch` gives number, height and width in strides."""
    shape = (batch[0], network.in_channels, batch[1] * network.stride, batch[2] * network.stride)
    return np.random.default_rng(0).uniform(*NORMALIZED_RANGE, shape).astype(np.float32)


def _called(network: Network) -> str:
    encoder = getattr(network.config.model, "encoder", None)
    return f"the {network.config.model.kind} network" + (f" with encoder '{encoder}'" if encoder else "")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
