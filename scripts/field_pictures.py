"""Draw the pictures of whole fields that stand in the README and in docs/results.md.

    python scripts/field_pictures.py DATA [--checkpoint nuciseg/fields] [--out docs/images]

DATA holds {train,test}/{images,masks}. Of the test images the upper left corners are drawn, 256 x 256 pixels or less:
`fields.png` has the image of median AP at IoU .5 of each of three sizes, `fields_worst.png` the six lowest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nuciseg.cli import run_verb
from nuciseg.config import DataConfig
from nuciseg.engine.checkpoint import find_checkpoint
from nuciseg.engine.datasets import open_samples
from nuciseg.engine.inference import predict_instances
from nuciseg.engine.network import load_network
from nuciseg.images import write_png
from nuciseg.metrics import score_image
from nuciseg.plots import contact_sheet, triptych

Images = tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int32]]  # input, truth, prediction

CORNER = np.s_[:256, :256]
SHAPES = ((256, 256), (360, 360), (520, 696))
NUM_WORST = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with test/images and test/masks")
    parser.add_argument("--checkpoint", type=Path, default=Path("nuciseg/fields"), help="of nuciseg (nuciseg/fields)")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures (docs/images)")
    arguments = parser.parse_args()
    network, _ = load_network(find_checkpoint(arguments.checkpoint), torch.device("cpu"))
    samples = open_samples(DataConfig(root=arguments.data, format="labels"), "test")
    scored: list[tuple[float, str, Images]] = []
    for found, instances in predict_instances(network, samples, range(len(samples.ids))):
        sample = samples[found.index]
        nothing_HW = np.zeros(sample.labels_HW.shape, bool)
        scores = score_image(found.id, instances.labels_HW, sample.labels_HW, nothing_HW, nothing_HW)
        images = (sample.image_HWC, sample.labels_HW, instances.labels_HW)
        scored.append((scores.average_precision(50), found.id, images))
    scored.sort(key=lambda row: row[:2])
    of_shape = [[row for row in scored if row[2][1].shape == shape] for shape in SHAPES]
    typical = [rows[len(rows) // 2] for rows in of_shape]
    legend = "input, truth, prediction; red: no partner of IoU >= .5"
    for name, rows, columns in (("fields", typical, 1), ("fields_worst", scored[:NUM_WORST], 2)):
        path = arguments.out / f"{name}.png"
        panels = [
            triptych(*(each[CORNER] for each in images), id[:12], failed=False, cell_px=224) for _, id, images in rows
        ]
        write_png(path, contact_sheet(panels, columns, legend=legend))
        print(f"{path}: " + ", ".join(f"{id[:12]} AP .5 {score:.3f}" for score, id, _ in rows))


if __name__ == "__main__":
    run_verb(main)
