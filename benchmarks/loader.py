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
import time
from dataclasses import replace
from pathlib import Path

import torch

from nuciseg.config import Config, load_config
from nuciseg.engine.checkpoint import CheckpointStore
from nuciseg.engine.datasets import TrainingSet, open_training_set
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import Trainer
from nuciseg.engine.network import build_network
from nuciseg.engine.precision import local_device
from nuciseg.losses import build_loss
from nuciseg.optim import build_optimizer


class Bare:
    """The network alone, on the first batch."""

    def __init__(self, config: Config, data: TrainingSet, device: torch.device) -> None:
        self.network = build_network(config, data.in_channels, device)
        self.loss = build_loss(config.loss).to(device)
        self.optimizer = build_optimizer(config.optim, self.network.model)
        loaded = data.training_data.load(data.training_data.plan(1, config.data.batch_size)[0], epoch=1).batch
        assert loaded is not None  # one worker has every image of a batch
        self.batch = loaded.to(device, self.network.precision.channels_last)

    def step_s(self, num_steps: int) -> float:
        start = time.perf_counter()
        self.network.model.train()
        for _ in range(num_steps):
            self.optimizer.zero_grad(set_to_none=True)
            with self.network.precision.autocast():
                logits_BKHW = self.network.model(self.batch.images_BCHW)
            self.loss(logits_BKHW, self.batch.targets_BKHW, self.batch.valid_BHW)["loss"].mean().backward()
            self.optimizer.step()
        if self.batch.images_BCHW.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / num_steps


class Loop:
    """nuciseg's own loop with a number of loader threads."""

    def __init__(self, config: Config, data: TrainingSet, device: torch.device, threads: int, folder: Path) -> None:
        config = config.replaced({"data.num_loader_threads": threads})
        self.trainer = Trainer(config, data, Place(device=device), CheckpointStore(folder / str(threads)))
        self.epoch = 0

    def step_s(self, num_steps: int) -> float:
        self.epoch += 1
        start = time.perf_counter()
        self.trainer.train_epoch(self.epoch)  # ends with figures from the device
        return (time.perf_counter() - start) / num_steps


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
    device, num_steps = local_device(), arguments.steps
    num_images = num_steps * arguments.batch_size
    config = load_config(overrides={
        "data": {"synthetic": {"num_train": num_images * 5 // 4 + 2, "num_test": 1},
                 "batch_size": arguments.batch_size, "crop_px": arguments.crop_px},
        "model": {"kind": "timm", "encoder": arguments.encoder},
        "train": {"precision": arguments.precision, "compile": arguments.compile, "epochs": arguments.rounds + 1},
    })  # fmt: skip
    data = open_training_set(config, stride=32)
    whole = data.training_data
    data = replace(data, training_data=replace(whole, indices=whole.indices[:num_images], multiple=arguments.crop_px))
    with tempfile.TemporaryDirectory() as folder:
        bare = Bare(config, data, device)
        loops = {threads: Loop(config, data, device, threads, Path(folder)) for threads in arguments.loader_threads}
        rows = []
        for number in range(arguments.rounds + 1):
            row = [bare.step_s(num_steps), *(loop.step_s(num_steps) for loop in loops.values())]
            if number:
                rows.append(row)
                print("ms a step: " + "  ".join(f"{1e3 * seconds:.1f}" for seconds in row), flush=True)
        for loop in loops.values():
            loop.trainer.close()
    ratios = [statistics.median(row[0] / row[place] for row in rows) for place in range(1, len(loops) + 1)]
    print(json.dumps({
        "loop_vs_bare": {threads: round(ratio, 3) for threads, ratio in zip(loops, ratios, strict=True)},
        "bare_ms": round(1e3 * statistics.median(row[0] for row in rows), 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(bare.network.precision.dtype or torch.float32).removeprefix("torch."),
        **{name: getattr(arguments, name) for name in ("encoder", "batch_size", "crop_px", "compile", "rounds")},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
