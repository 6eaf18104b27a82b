"""Batch normalisation folded into the convolution before it: the same answer in fewer passes over memory."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-3  # of logits in fp32


def folded(model: nn.Module, in_channels: int, stride: int) -> nn.Module:
    """A copy of `model`, for prediction alone, in which each convolution has taken in the normalisation that follows.

    Which follows which is read from the order in which modules were registered. Some networks normalise in another
    order, so the copy is asked the same as the model, and where they differ the model itself is returned.
    """
    fused = copy.deepcopy(model).eval()
    for parent in list(fused.modules()):
        children = list(parent.named_children())
        for (name, module), (norm_name, norm) in pairwise(children):
            if not isinstance(norm, nn.BatchNorm2d) or not norm.track_running_stats:
                continue
            wrapped = list(module.named_children())  # our depthwise convolutions lie in a wrapper
            holder, conv_name, conv = (module, *wrapped[0]) if len(wrapped) == 1 else (parent, name, module)
            if isinstance(conv, nn.Conv2d):
                setattr(holder, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, _what_else(norm))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.rand(2, in_channels, 4 * stride, 4 * stride, generator=generator).to(device)
    with torch.inference_mode():
        same = torch.allclose(model(images_BCHW), fused(images_BCHW), atol=TOLERANCE, rtol=TOLERANCE)
    return fused if same else model


def _what_else(norm: nn.BatchNorm2d) -> nn.Module:
    """timm's normalisations drop and activate as well."""
    return nn.Sequential(*(each for name in ("drop", "act") if (each := getattr(norm, name, None)) is not None))
