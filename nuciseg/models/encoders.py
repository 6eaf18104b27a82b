"""A timm encoder that takes microscope images: channels, value range, weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from nuciseg.errors import ConfigError
from nuciseg.models.config import ChannelPolicy, TimmConfig
from nuciseg.models.timm_library import import_timm
from nuciseg.models.weights import hub_access, input_normalization, read_weights

_ENCODER_CHANNELS = 3


class Encoder(nn.Module):
    """Features of images (B, C, H, W) by their stride, each (B, channels[stride], H/stride, W/stride).

    What goes in, and whether it is normalised, `TimmConfig` says.
    """

    input_mean: torch.Tensor
    input_std: torch.Tensor

    def __init__(self, config: TimmConfig, in_channels: int, load_weights: bool) -> None:
        super().__init__()
        name = config.encoder
        own_channels = in_channels if config.channel_policy == "averaged" else _ENCODER_CHANNELS
        self.adapter = _adapter(in_channels, config.channel_policy)
        self.network = _build_network(name, config.stages, own_channels, config.pretrained if load_weights else None)
        for module in self.network.modules():
            # Some encoders (EfficientNet) keep 99 % of the running statistics a step, made for runs of 100 000 steps.
            # Here a run has a few hundred, and validation would normalise with what is left of the beginning.
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = max(module.momentum or 0.0, 0.1)
        _wrap_depthwise(self.network)
        self.channels: dict[int, int] = dict(
            zip(self.network.feature_info.reduction(), self.network.feature_info.channels(), strict=True)
        )
        self.is_channels_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
        self._probe(name, own_channels)
        self.input_range = config.input_range if config.normalizes_input else None
        if config.normalizes_input:
            expected = input_normalization(name, config.pretrained)
            mean, std = torch.tensor(expected.mean), torch.tensor(expected.std)
            if own_channels != _ENCODER_CHANNELS:  # kernels were summed: one normalisation for all
                mean, std = mean.mean().expand(own_channels).clone(), std.mean().expand(own_channels).clone()
            self.register_buffer("input_mean", mean.view(1, -1, 1, 1))
            self.register_buffer("input_std", std.view(1, -1, 1, 1))
        self.is_frozen = False
        self._trained = [parameter for parameter in self.parameters() if parameter.requires_grad]

    def freeze(self, frozen: bool) -> None:
        """While frozen, nothing in here changes: no gradient is computed, and `train` leaves it in evaluation mode.

        Without a gradient no optimizer touches a weight (nor decays it, nor gathers momentum for the time after), the
        clipped norm is that of the trained weights alone, and the pass backward through the encoder is saved.
        """
        self.is_frozen = frozen
        for parameter in self._trained:
            parameter.requires_grad_(not frozen)
        self.train(not frozen)

    def train(self, mode: bool = True) -> Encoder:
        return super().train(mode and not self.is_frozen)

    def _probe(self, name: str, own_channels: int) -> None:
        """Sees that features lie where timm says, and freezes what they do not depend on.

        Data-parallel training would wait for the gradients of unused layers.
        """
        stride = max(self.channels)
        height, width = 7 * stride, 5 * stride
        was_training = self.network.training
        self.network.eval()  # leaves the statistics of batch normalisation alone
        try:
            features = self._features(torch.zeros(1, own_channels, height, width))
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"'{name}' (model.encoder) cannot take images of every multiple of its stride {stride} ({error}): "
                "choose another encoder or other model.stages"
            ) from error
        for level, feature in features.items():
            expected = (1, self.channels[level], height // level, width // level)
            if tuple(feature.shape) != expected:
                raise ConfigError(
                    f"'{name}' (model.encoder) gives features of shape {tuple(feature.shape)} where a stride of "
                    f"{level} should give {expected}: choose another encoder"
                )
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        total = torch.stack([feature.sum() for feature in features.values()]).sum()
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True
        ):
            parameter.requires_grad_(gradient is not None)
        self.network.train(was_training)

    def _features(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        features = self.network(x)
        if self.is_channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return dict(zip(self.channels, features, strict=True))

    def forward(self, images_BCHW: torch.Tensor) -> dict[int, torch.Tensor]:
        x = images_BCHW
        if self.input_range is not None:
            low, high = self.input_range
            x = (x.clamp(low, high) - low) / (high - low)
        x = self.adapter(x)
        if self.input_range is not None:
            x = (x - self.input_mean) / self.input_std
        return self._features(x)


class _DepthwiseConv(nn.Module):
    """A depthwise convolution that trains in float32 under bf16 autocast on a CPU.

    There PyTorch 2.13's backward in bf16 took 4 to 6 times as long (672 channels, 5x5, 8x8 pixels: 20 ms for 5 ms),
    and was half of an EfficientNet's step.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        has_backward = torch.is_grad_enabled() and (x.requires_grad or self.conv.weight.requires_grad)
        if x.device.type == "cpu" and has_backward and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self.conv(x.float()).to(x.dtype)  # type: ignore[no-any-return]
        return self.conv(x)  # type: ignore[no-any-return]


def _wrap_depthwise(network: nn.Module) -> None:
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            parent, _, child = name.rpartition(".")
            network.get_submodule(parent).set_submodule(child, _DepthwiseConv(module))


class _ZeroChannels(nn.Module):
    """Appends channels of zeros."""

    def __init__(self, num_zeros: int) -> None:
        super().__init__()
        self.num_zeros = num_zeros

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.num_zeros))


class _RepeatChannels(nn.Module):
    """One channel to three."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not expand(): its stride of 0 makes the first convolution leave channels_last.
        return x.repeat(1, _ENCODER_CHANNELS, 1, 1)


def _adapter(in_channels: int, policy: ChannelPolicy) -> nn.Module:
    """From the image's channels to the encoder's three, unless the encoder was changed to the image's ('averaged')."""
    if policy == "averaged" or (in_channels == _ENCODER_CHANNELS and policy != "learned"):
        return nn.Identity()
    if policy == "learned":
        mix = nn.Conv2d(in_channels, _ENCODER_CHANNELS, 1, bias=False)
        nn.init.constant_(mix.weight, 1 / in_channels)
        return mix
    if policy == "copy" and in_channels == 1:
        return _RepeatChannels()
    if policy == "zero" and in_channels < _ENCODER_CHANNELS:
        return _ZeroChannels(_ENCODER_CHANNELS - in_channels)
    raise ConfigError(
        f"model.channel_policy is '{policy}', which cannot give images of {in_channels} channels to an encoder of "
        f"{_ENCODER_CHANNELS}: choose 'learned' or 'averaged'"
    )


def num_feature_levels(name: str) -> int:
    """How many feature levels timm's encoder has, at growing strides. Raises ConfigError where it has none such."""
    return len(_outline(name).feature_info.reduction())


def _outline(name: str) -> Any:
    """timm's feature extractor with all its levels: shapes alone, no memory and no random numbers."""
    try:
        with torch.device("meta"):
            network = import_timm().create_model(name, pretrained=False, features_only=True)
    except (RuntimeError, AttributeError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"timm's '{name}' (model.encoder) gives no features ({error}): choose another encoder"
        ) from error
    levels = network.feature_info.reduction()
    if levels != sorted(set(levels)):
        raise ConfigError(
            f"the features of '{name}' (model.encoder) lie at strides {', '.join(map(str, levels))} where growing ones "
            "are needed: choose a convolutional or hierarchical encoder, such as resnet18 or convnext_atto"
        )
    return network


def _build_network(name: str, stages: int, in_channels: int, pretrained: str | None) -> Any:
    """timm's feature extractor, cut after `stages` feature levels.

    Raises:
        ConfigError: it gives no features at growing strides, fewer of them, or takes one image size only.
    """
    create = import_timm().create_model
    network = _outline(name)
    levels = network.feature_info.reduction()
    if stages > len(levels):
        raise ConfigError(f"model.stages is {stages}, but '{name}' has {len(levels)}: choose at most {len(levels)}")
    options: dict[str, Any] = {"features_only": True, "out_indices": tuple(range(stages)), "in_chans": in_channels}
    if import_timm().get_pretrained_cfg_value(name, "fixed_input_size"):
        options |= _any_size_options(name)
    if type(network).__name__ != "FeatureListNet":  # the one kind that leaves out what lies behind the last feature
        options |= _pruning_options(name, options)
    if pretrained is None:
        return create(name, pretrained=False, **options)
    if pretrained == "hub":
        with hub_access(name):
            return create(name, pretrained=True, **options)
    weights = read_weights(name, pretrained)
    # timm warns of tensors that features do not need (the classifier); that none is missing was checked.
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)
    return create(name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights}, **options)


def _pruning_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What makes timm leave out the layers behind the last feature, where this family of networks can.

    EfficientNets would else compute all their stages, and train them on nothing.
    """
    try:
        with torch.device("meta"):
            import_timm().create_model(name, pretrained=False, feature_cls="getter", **options)
    except (TypeError, AttributeError, AssertionError):
        return {}
    return {"feature_cls": "getter"}


def _any_size_options(name: str) -> dict[str, Any]:
    """What timm wants to be told so that an encoder made for one image size takes others."""
    for options in ({"strict_img_size": False}, {"dynamic_img_size": True}):
        try:
            with torch.device("meta"):
                import_timm().create_model(name, pretrained=False, **options)
        except TypeError:  # unknown to this family of networks
            continue
        return options
    raise ConfigError(
        f"'{name}' (model.encoder) takes images of one size only: choose a convolutional encoder, such as resnet18"
    )
