"""Which floating-point type and memory format a device computes fastest in, and whether its memory was too small."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from nuciseg.config import TrainConfig
from nuciseg.errors import ResourceError


@dataclass(frozen=True)
class Precision:
    """Autocast type (None: full precision) and memory format of a run on one device."""

    device: torch.device
    dtype: torch.dtype | None
    channels_last: bool

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @property
    def needs_loss_scaling(self) -> bool:
        """fp16 gradients underflow without it; bf16 has the range of fp32."""
        return self.dtype is torch.float16


def local_device() -> torch.device:
    """The first GPU where there is one, else the CPU: for commands that compute in their own process."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy, torch or OpenCV raised `error` for want of memory."""
    said = str(error)  # what torch raises on a CPU, and OpenCV, are classes for everything
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "can't allocate memory" in said
        or "Insufficient memory" in said
    )


def choose_precision(config: TrainConfig, device: torch.device) -> Precision:
    """What the configuration asks for; where it says auto, the fastest that the device computes natively.

    Raises ResourceError where fp16 is asked of a CPU, which emulates it slower than fp32.
    """
    if config.precision == "auto":
        dtype = _fastest_native(device)
    else:
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    if dtype is torch.float16 and device.type == "cpu":
        raise ResourceError("train.precision is fp16, which needs a GPU; set train.precision to bf16, fp32 or auto")
    # Measured on CPU: channels_last is several times faster in bf16 and slower in fp32.
    channels_last = config.channels_last if config.channels_last is not None else dtype is not None
    return Precision(device, dtype, channels_last)


def _fastest_native(device: torch.device) -> torch.dtype | None:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return None
