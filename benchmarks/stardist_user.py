"""StarDist as its examples use it, for a Python that has StarDist and need not have nuciseg.

    stardist_user.py predict     the passes of inference.py; the job comes on stdin, see alternating.py
    stardist_user.py train       the training of time_to_accuracy.py; the job comes on stdin, rows go to its `log`

The network is that of 2D_paper_dsb2018: 32 rays, a U-Net of depth 3 that begins with 32 filters. `grid` 1 is that
model's; its training example sets 2, which halves the resolution that the network computes at.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alternating import Pass, serve

try:
    import imageio.v3
    import keras
    import numpy as np
    import tifffile
    from csbdeep.io import save_tiff_imagej_compatible
    from csbdeep.utils import normalize
    from stardist import edt_prob, fill_label_holes, star_dist
    from stardist.matching import matching_dataset
    from stardist.models import Config2D, StarDist2D
except ModuleNotFoundError as error:
    sys.exit(
        f"{error.name} is not installed for {sys.executable}; pip install -e '.[bench]', or name a Python that has "
        "stardist and tensorflow with --stardist-python"
    )

PROB_THRESHOLD, NMS_THRESHOLD = 0.5, 0.4  # StarDist's own, until they are optimised on a data set


def read(path: str) -> Any:
    """The image or labels (H, W) at `path`."""
    return tifffile.imread(path) if path.endswith((".tif", ".tiff")) else imageio.v3.imread(path)


def build(grid: int, **settings: Any) -> Any:
    config = Config2D(
        n_rays=32, grid=(grid, grid), unet_n_depth=3, unet_n_filter_base=32, n_channel_in=1, **settings
    )  # fmt: skip
    return StarDist2D(config, basedir=None)


def instances(model: Any, image_HW: Any) -> Any:
    labels_HW, _ = model.predict_instances(image_HW, prob_thresh=PROB_THRESHOLD, nms_thresh=NMS_THRESHOLD)
    return labels_HW


# ------------------------------------------------------------------------------------------------------- predicting
class ToldNetwork:
    """A network that computes as ever, and then answers with the maps that it would have learnt.

    The time of a network does not depend on its weights, that of non-maximum suppression on how many pixels are
    candidates: with these maps it has as many as on real nuclei, without a training.
    """

    def __init__(self, model: Any, labels: Sequence[Any]) -> None:
        self.network, self.labels, self.index = model.keras_model, labels, 0
        self.grid, self.num_rays = model.config.grid, model.config.n_rays
        self.maps: dict[int, tuple[Any, Any]] = {}
        model.keras_model = self

    def predict(self, images_BHWC: Any, **arguments: Any) -> tuple[Any, Any]:
        self.network.predict(images_BHWC, **arguments)
        if self.index not in self.maps:  # in the warm-up
            self.maps[self.index] = self._maps(self.labels[self.index], images_BHWC.shape[1:3])
        return self.maps[self.index]

    def _maps(self, labels_HW: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
        """Probability and distances as StarDist's training makes them, of an image that it padded to `shape`."""
        padded_HW = np.pad(labels_HW, [(0, whole - part) for whole, part in zip(shape, labels_HW.shape, strict=True)])
        prob_HW = edt_prob(padded_HW[:: self.grid[0], :: self.grid[1]])
        dist_HWK = star_dist(padded_HW, self.num_rays, grid=self.grid)
        return prob_HW[None, ..., None], dist_HWK[None]

    @property
    def num_candidates(self) -> int:
        return sum(int((prob > PROB_THRESHOLD).sum()) for prob, _ in self.maps.values())


def prepare_passes(job: dict[str, Any]) -> tuple[dict[str, Pass], dict[str, Any]]:
    images, folder = job["images"], Path(job["out"])
    model = build(job["grid"])
    network = ToldNetwork(model, [read(path) for path in job["labels"]])
    arrays = [normalize(read(path), 1, 99.8, axis=(0, 1)) for path in images]

    def files() -> int:
        num_nuclei = 0
        for network.index, path in enumerate(images):
            labels_HW = instances(model, normalize(read(path), 1, 99.8, axis=(0, 1)))
            save_tiff_imagej_compatible(folder / f"{Path(path).stem}.tif", labels_HW, axes="YX")
            num_nuclei += int(labels_HW.max())
        return num_nuclei

    def in_memory() -> int:
        num_nuclei = 0
        for network.index, image_HW in enumerate(arrays):
            num_nuclei += int(instances(model, image_HW).max())
        return num_nuclei

    files()  # TensorFlow compiles for every shape that it has not seen
    return {"files": files, "arrays": in_memory}, {"candidates": network.num_candidates}


# --------------------------------------------------------------------------------------------------------- training
def augment(generator: np.random.Generator, image_HW: Any, labels_HW: Any) -> tuple[Any, Any]:
    """The augmentation of StarDist's example: turned and mirrored at random, other contrast and brightness, noise."""
    num_turns, mirrored = generator.integers(4), generator.random() < 0.5
    image_HW, labels_HW = (np.rot90(each, num_turns) for each in (image_HW, labels_HW))
    if mirrored:
        image_HW, labels_HW = image_HW[::-1], labels_HW[::-1]
    image_HW = image_HW * generator.uniform(0.6, 2.0) + generator.uniform(-0.2, 0.2)
    return image_HW + 0.02 * generator.random() * generator.normal(0, 1, image_HW.shape), labels_HW


class Watch(keras.callbacks.Callback):
    """Writes a row an epoch, and ends the training where its target or its time is reached.

    Clocks the steps alone: not Keras's validation of the loss, nor the decoding that the score needs.
    """

    def __init__(self, model: Any, job: dict[str, Any], images: Sequence[Any], labels: Sequence[Any]) -> None:
        super().__init__()
        self.stardist, self.job, self.images, self.labels = model, job, images, labels
        self.train_s, self.start = 0.0, 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.start = time.perf_counter()

    def on_test_begin(self, logs: Any = None) -> None:
        self.train_s += time.perf_counter() - self.start

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        over = self.train_s >= self.job["limit_s"]
        row: dict[str, Any] = {"epoch": epoch + 1, "train_s": self.train_s}
        if over or (epoch + 1) % self.job["every"] == 0:
            row["ap50_pooled"] = self.score()
        with open(self.job["log"], "a", encoding="utf-8") as log:
            print(json.dumps(row), file=log)
        found = f"AP {row['ap50_pooled']:.4f}" if "ap50_pooled" in row else ""
        print(f"StarDist, epoch {epoch + 1}: {self.train_s / 60:.1f} minutes {found}", file=sys.stderr, flush=True)
        self.stardist.keras_model.stop_training = over or row.get("ap50_pooled", 0.0) >= self.job["target"]

    def score(self) -> float:
        """AP at IoU .5 of the validation images, their counts added up."""
        found = [instances(self.stardist, image_HW) for image_HW in self.images]
        return float(matching_dataset(self.labels, found, thresh=0.5, by_image=False, show_progress=False).accuracy)


def train(job: dict[str, Any]) -> None:
    """Train as the example does: patches of 256 pixels, 4 a step, 100 steps an epoch, 400 epochs."""
    keras.utils.set_random_seed(job["seed"])  # NumPy's, too, which StarDist draws patches with
    generator = np.random.default_rng(job["seed"])
    images = {path: normalize(read(path), 1, 99.8, axis=(0, 1)) for pairs in job["pairs"].values() for path, _ in pairs}
    labels = {path: fill_label_holes(read(path)) for pairs in job["pairs"].values() for _, path in pairs}
    (x_train, y_train), (x_val, y_val) = (
        ([images[image] for image, _ in job["pairs"][part]], [labels[mask] for _, mask in job["pairs"][part]])
        for part in ("train", "validation")
    )
    model = build(job["grid"], train_patch_size=(256, 256), train_batch_size=4, train_epochs=job["epochs"],
                  train_steps_per_epoch=job["steps"])  # fmt: skip
    model.prepare_for_training()
    model.callbacks.append(Watch(model, job, x_val, y_val))
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        model.train(x_train, y_train, validation_data=(x_val, y_val), augmenter=lambda x, y: augment(generator, x, y))


if __name__ == "__main__":
    if sys.argv[1] == "predict":
        serve(prepare_passes)
    else:
        train(json.loads(sys.stdin.readline()))
