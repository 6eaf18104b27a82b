"""The nuclei of an image that belongs to no data set."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nuciseg.engine.datasets import refuse_smaller_than
from nuciseg.engine.inference import predict_instances
from nuciseg.engine.network import Network
from nuciseg.types import Instances, Sample


@dataclass(frozen=True)
class OneImage:
    """A `SampleStore` of one image without labels."""

    id: str
    sample: Sample

    @property
    def ids(self) -> tuple[str, ...]:
        return (self.id,)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.sample.image_HWC.shape,)

    def __getitem__(self, index: int) -> Sample:
        return (self.sample,)[index]


def predict_image(network: Network, image_HW: NDArray[np.generic], name: str) -> Instances:
    """The separated nuclei of one grey image of any size; it is padded to the network's stride inside.

    By itself, so that the answer does not depend on which other images are asked for, as the padding of a batch
    would make it. Raises DataError, which calls the image `name`, where a side is shorter than the stride.
    """
    image = OneImage(name, Sample(image_HW[..., None], np.zeros(image_HW.shape, np.int32)))
    refuse_smaller_than(network.stride, image)
    ((found, instances),) = predict_instances(network, image, [0])
    return replace(instances, num_open_borders=network.target.open_borders(found.maps_KHW))
