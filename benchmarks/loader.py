"""How well the loader feeds this machine's GPU (or CPU): the training loop beside the network alone, by loader threads.

    python benchmarks/loader.py [--encoder resnet18] [--batch-size 16] [--loader-threads 1 4 12] [--precision bf16]

In alternating rounds: forward, backward and step on one batch that lies in memory, then an epoch of nuciseg's loop with
each number of `data.num_loader_threads`, on drawn clusters, every image on the same square canvas. Prints milliseconds
a step; the last line is one JSON object, `loop_vs_bare` by threads: images/s of the loop / of the network alone, median
of the rounds. With one thread it tells whether making images is the limit, with more whether the threads disturb the
one that launches the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from throughput import bare_loop, equal_canvases, nuciseg_loop

from nuciseg.config import load_config
from nuciseg.engine.checkpoint import CheckpointStore
from nuciseg.engine.datasets import open_training_set
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import Trainer
from nuciseg.engine.precision import local_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="tf_efficientnet_lite0", help="timm encoder (tf_efficientnet_lite0)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step (16)")
    parser.add_argument("--crop-px", type=int, default=192, help="side of every image, pixels (192)")
    parser.add_argument("--loader-threads", type=int, nargs="+", default=[1, 4], help="numbers to compare (1 4)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="(auto)")
    parser.add_argument("--compile", action="store_true", help="train.compile in the loop")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round (20)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one that warms up (5)")
    arguments = parser.parse_args()
    device, num_images = local_device(), arguments.steps * arguments.batch_size
    config = load_config(overrides={
        "data": {"synthetic": {"num_train": num_images * 5 // 4 + 2, "num_test": 1},
                 "batch_size": arguments.batch_size, "crop_px": arguments.crop_px},
        "model": {"kind": "timm", "encoder": arguments.encoder},
        "train": {"precision": arguments.precision, "compile": arguments.compile, "epochs": arguments.rounds + 1},
    })  # fmt: skip
    data = equal_canvases(open_training_set(config, stride=32), config, num_images)
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            Trainer(
                config.replaced({"data.num_loader_threads": threads}),
                data,
                Place(device=device),
                CheckpointStore(Path(folder) / str(threads)),
            )
            for threads in arguments.loader_threads
        ]
        loops = [bare_loop(config, data, device), *map(nuciseg_loop, trainers)]
        rows = []
        for number in range(arguments.rounds + 1):
            row = [loop().images_per_s for loop in loops]
            if number:
                rows.append(row)
                print("ms a step: " + "  ".join(f"{1e3 * arguments.batch_size / rate:.1f}" for rate in row), flush=True)
        for trainer in trainers:
            trainer.close()
    ratios = [statistics.median(row[place] / row[0] for row in rows) for place in range(1, len(loops))]
    print(json.dumps({
        "loop_vs_bare": {
            threads: round(ratio, 3) for threads, ratio in zip(arguments.loader_threads, ratios, strict=True)
        },
        "bare_ms": round(1e3 * arguments.batch_size / statistics.median(row[0] for row in rows), 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(trainers[0].network.precision.dtype or torch.float32).removeprefix("torch."),
        **{name: getattr(arguments, name) for name in ("encoder", "batch_size", "crop_px", "compile", "rounds")},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
