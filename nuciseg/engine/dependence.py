"""Does a network read the nuclei, or the border that was drawn around them? Scores with other drawn borders tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from nuciseg.data.dataset import SampleStore
from nuciseg.data.markings import erase_marking, shift_marking
from nuciseg.engine.inference import score_samples
from nuciseg.engine.network import Network
from nuciseg.metrics import Scores
from nuciseg.types import Sample

SHIFT_PX = 3  # the width of the drawn line: not one of its pixels stays where it runs along an axis

_MARKINGS: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "erased": erase_marking,
    f"shifted by {SHIFT_PX} px": partial(shift_marking, rows=SHIFT_PX, columns=-SHIFT_PX),
}


@dataclass(frozen=True)
class _Marked:
    """`samples` with their drawn border changed."""

    samples: SampleStore
    change: Callable[[NDArray[Any]], NDArray[Any]]

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        return self.samples.shapes

    @property
    def ids(self) -> Sequence[str]:
        return self.samples.ids

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        return Sample(self.change(sample.image_HWC), sample.labels_HW)


def scores_by_marking(network: Network, samples: SampleStore, indices: Sequence[int]) -> dict[str, Scores]:
    """The scores of the samples at `indices` with their drawn border erased, and moved by a few pixels.

    A network that was trained with `data.marking: erased` is shown no border in either case.
    """
    return {
        name: Scores.total(score_samples(network, _Marked(samples, change), indices))
        for name, change in _MARKINGS.items()
    }
