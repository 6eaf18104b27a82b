"""Exported networks: ONNX answers as PyTorch does at any size, says how it is used, or is refused."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from nuciseg import __version__
from nuciseg.config import load_config
from nuciseg.data.dataset import NormalizationConfig, normalize
from nuciseg.engine.exporting import MAX_DIFFERENCE, OnnxModel, export_onnx, require_packages
from nuciseg.engine.model_zoo import Credits, pack_for_model_zoo, require_model_zoo_packages, scale_range
from nuciseg.engine.network import Network, build_network
from nuciseg.errors import CheckpointError, ConfigError, ResourceError

MODELS = {
    "unet": {"kind": "unet", "depth": 2, "width": 4},
    "timm": {"kind": "timm", "encoder": "resnet18", "stages": 2, "input_normalization": True},
    "baseline": {"kind": "baseline", "widths": [4, 8]},
}
CREDITS = Credits("nuciseg test: tiny", "# A network for a test", ["Ada Nym"], "MIT")


def fresh(kind: str, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    config = load_config(overrides={"model": MODELS[kind], "target": {"decode": {"border_threshold": 0.25}}})
    network = build_network(config, 1, torch.device("cpu"), load_pretrained=False)
    network.model.eval()
    return network


@pytest.fixture(params=MODELS)
def network(request: pytest.FixtureRequest) -> Network:
    return fresh(request.param)


def session_of(model: OnnxModel) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.data, providers=["CPUExecutionProvider"])


def test_onnx_answers_as_pytorch_at_any_size(network: Network) -> None:
    exported = export_onnx(network)
    assert 0 <= exported.max_difference < MAX_DIFFERENCE
    session = session_of(exported)
    stride = network.stride
    for num_images, rows, columns in ((1, 1, 1), (2, 9, 4), (3, 2, 11)):
        images_BCHW = torch.rand(num_images, 1, rows * stride, columns * stride) * 4 - 1
        (found,) = session.run(["probabilities"], {"images": images_BCHW.numpy()})
        with torch.inference_mode():
            expected = network.model(images_BCHW).sigmoid().numpy()
        assert found.dtype == np.float32
        assert found.shape == (num_images, len(network.target.map_names), rows * stride, columns * stride)
        assert np.abs(found - expected).max() < MAX_DIFFERENCE
        assert expected.std() > 0


def test_the_metadata_say_how_it_is_used() -> None:
    network = fresh("unet")
    model = onnx.load_model_from_string(export_onnx(network).data)
    onnx.checker.check_model(model, full_check=True)
    assert [each.version for each in model.opset_import if each.domain == ""] == [17]
    found = {each.key: json.loads(each.value) for each in model.metadata_props}
    assert found["nuciseg_version"] == __version__
    assert found["stride"] == 4
    assert found["map_names"] == list(network.target.map_names)
    assert found["normalization"] == {
        "low_percentile": 1.0, "high_percentile": 99.8, "ignore_extremes": True, "range": [-1.0, 3.0],
    }  # fmt: skip
    assert found["decode"]["border_threshold"] == 0.25
    assert found["target"]["kind"] == network.config.target.kind


class _OfOneSize(nn.Module):
    """Its trace holds the size of the first image."""

    stride = 4

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([images_BCHW * float(images_BCHW.shape[-1]), images_BCHW], dim=1)


def test_an_answer_that_differs_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"the unet network answers differently as ONNX, by up to 0\.\d+"):
        export_onnx(replace(fresh("unet"), model=_OfOneSize()))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ResourceError, match=r"^export needs onnx and onnxruntime: pip install 'nuciseg\[export\]'$"):
        export_onnx(fresh("unet"))
    require_packages(["json"])


@pytest.fixture
def model_zoo() -> None:
    """Skips a test where the packages for model packages are not there, or do not fit each other."""
    try:
        require_model_zoo_packages()
    except ResourceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("spec", "pydantic", "fits"), [
    ("0.5.12.0", "2.13.5", True), ("0.5.12.0", "2.14.4", False), ("0.5.14.3", "2.14.4", True),
])  # fmt: skip
def test_packages_that_do_not_fit_are_named(
    spec: str, pydantic: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"bioimageio.spec": spec, "pydantic": pydantic}
    monkeypatch.setattr("nuciseg.engine.model_zoo.version", lambda name: versions.get(name) or version(name))
    if fits:
        require_model_zoo_packages()
    else:
        with pytest.raises(ResourceError, match=r"0\.5\.12\.0 fails with pydantic 2\.14\.4: pip install 'pydantic<2"):
            require_model_zoo_packages()


@pytest.mark.usefixtures("model_zoo")
def test_a_package_passes_the_test_of_bioimage_io_without_a_connection() -> None:
    network = fresh("unet")
    data, said = pack_for_model_zoo(network, export_onnx(network), CREDITS)
    assert said.startswith("passed (")
    with zipfile.ZipFile(io.BytesIO(data)) as package:
        assert {"rdf.yaml", "README.md", "cover.png", "test_input.npy", "test_output.npy", "weights.onnx"} == set(
            package.namelist()
        )
        description, readme = package.read("rdf.yaml").decode(), package.read("README.md").decode()
        shape = np.load(io.BytesIO(package.read("test_output.npy"))).shape
    assert "name: nuciseg test_ tiny" in description
    assert "license: MIT" in description
    assert "- name: Ada Nym" in description
    assert "min_percentile: 1.0" in description
    assert readme.startswith(CREDITS.card)
    assert "ignore_extremes" in readme
    assert shape[1] == len(network.target.map_names)


@pytest.mark.usefixtures("model_zoo")
def test_a_package_that_fails_the_test_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"the package does not pass bioimage\.io's own test: "):
        pack_for_model_zoo(fresh("unet"), export_onnx(fresh("unet", seed=1)), CREDITS)


@pytest.mark.usefixtures("model_zoo")
def test_an_unknown_licence_is_refused() -> None:
    with pytest.raises(ConfigError, match="'mine' is not the SPDX identifier of a licence"):
        pack_for_model_zoo(fresh("unet"), OnnxModel(b"", 0.0), replace(CREDITS, license="mine"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_package_scales_as_nuciseg_does_where_nothing_is_a_mark(dtype: type[np.unsignedinteger]) -> None:
    config = NormalizationConfig(ignore_extremes=False)
    top = np.iinfo(dtype).max
    image_HW = np.random.default_rng(0).gamma(2.0, top / 12, (60, 80)).clip(1, top - 1).astype(dtype)
    own_HW = normalize(image_HW[..., None], config)[..., 0]
    package_HW = scale_range(image_HW[None, None].astype(np.float32), config)[0, 0]
    low, high = np.percentile(image_HW, [1.0, 99.8])
    grey_levels = np.diff(np.sort(image_HW, axis=None).astype(int))[-20:].max()  # between neighbouring percentiles
    assert np.abs(own_HW - package_HW).max() < 1.5 * grey_levels / (high - low)
    assert own_HW.std() > 0.1
