"""What the network is taught and how its answer is read: `encode(labels) -> maps`, `decode(maps) -> instances`.

- `touching_border`, `full_border` (`borders.py`): foreground and border, for clusters that were cut out.
- `depth` (`depth.py`): foreground, touching border and depth within the nucleus, for whole fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Protocol

from pydantic import Field

from nuciseg.targets import borders, depth
from nuciseg.targets.borders import (
    BorderTarget,
    DecodeConfig,
    FloatImage,
    FullBorderConfig,
    LabelImage,
    Mask,
    TouchingBorderConfig,
)
from nuciseg.targets.depth import DepthConfig, DepthTarget
from nuciseg.types import Instances

__all__ = [
    "DecodeConfig", "DepthConfig", "FloatImage", "FullBorderConfig", "LabelImage", "Mask",
    "Target", "TargetConfig", "TouchingBorderConfig", "build_target", "decode_grids",
]  # fmt: skip

TargetConfig = Annotated[TouchingBorderConfig | FullBorderConfig | DepthConfig, Field(discriminator="kind")]


class Target(Protocol):
    """One way of teaching labels. Picklable and stateless."""

    @property
    def config(self) -> TargetConfig: ...
    @property
    def map_names(self) -> tuple[str, ...]: ...
    @property
    def border_index(self) -> int:
        """Which map is the border."""
        ...

    @property
    def typical_shares(self) -> tuple[float, ...]:
        """Of the pixels, by map: where a fresh network starts."""
        ...

    @property
    def decoded_by(self) -> tuple[str, ...]:
        """The keys of `config.decode` that `decode` heeds."""
        ...

    def encode(self, labels_HW: LabelImage, /) -> FloatImage:
        """The maps (K, H, W) that a network is taught, in [0, 1]."""
        ...

    def border_of(self, labels_HW: LabelImage, /) -> Mask:
        """The true border (H, W)."""
        ...

    def border_found(self, probabilities_KHW: FloatImage, /) -> Mask:
        """The border (H, W) that the network found."""
        ...

    def open_borders(self, probabilities_KHW: FloatImage, /) -> int | None:
        """How many borders are there but do not close; None where the target needs no closed border."""
        ...

    def decode(self, probabilities_KHW: FloatImage, /) -> Instances:
        """Nuclei from probabilities (K, H, W) in [0, 1]."""
        ...


def build_target(config: Any) -> Target:
    """The target that `config`, one of `TargetConfig`, describes."""
    return DepthTarget(config) if isinstance(config, DepthConfig) else BorderTarget(config)


def decode_grids(config: Any) -> Iterator[Callable[[Any], list[list[Any]]]]:
    """How to choose the decoding on validation maps, step by step.

    Each step makes a grid of the best configuration so far, decoded in other ways: two of its settings, named in
    `CALIBRATED` beside the target, change along the rows and along the columns.
    """
    for axes in (depth if isinstance(config, DepthConfig) else borders).CALIBRATED:
        yield partial(_grid, axes=axes)


def _grid(config: Any, axes: Sequence[tuple[str, Sequence[float]]]) -> list[list[Any]]:
    (row_key, row_values), (column_key, column_values) = axes

    def decoded_with(row_value: float, column_value: float) -> Any:
        decode = config.decode.model_copy(update={row_key: row_value, column_key: column_value})
        return config.model_copy(update={"decode": decode})

    return [[decoded_with(row, column) for column in column_values] for row in row_values]
