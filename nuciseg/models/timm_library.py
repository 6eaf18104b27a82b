"""timm itself, imported when the first name is checked or the first encoder is built (it takes a second or more)."""

from __future__ import annotations

import difflib
import functools
import importlib
from types import ModuleType

import torch

_operators: list[torch.library.Library] = []  # a declaration lives only as long as its Library


@functools.cache
def import_timm() -> ModuleType:
    """timm, also where torchvision's binary was built for another PyTorch.

    torchvision's PyPI wheel beside a CPU-only PyTorch fails at import with "operator torchvision::nms does not
    exist", and timm imports torchvision. timm uses none of its operators, so declaring them is enough.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _operators.append(library)
    return importlib.import_module("timm")


@functools.cache
def _pretrained_names() -> frozenset[str]:
    return frozenset(import_timm().list_pretrained())


def check_encoder_name(name: str) -> str:
    """`name`, if timm knows it (no network needed). Raises ValueError with the nearest names otherwise."""
    timm = import_timm()
    tagged = "." in name
    known = name in _pretrained_names() if tagged else timm.is_model(name)
    if not known:
        nearest = difflib.get_close_matches(
            name, _pretrained_names() if tagged else timm.list_models(), n=3, cutoff=0.4
        )
        hint = f": did you mean {' or '.join(nearest)}?" if nearest else ""
        raise ValueError(f"timm has no encoder named '{name}'{hint} (timm.list_models() lists all)")
    return name
