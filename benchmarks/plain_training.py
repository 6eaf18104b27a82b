"""nuciseg's training loop without Ray, for scaling.py: one process, or as many as torchrun starts.

    python benchmarks/plain_training.py OUT [--config FILE] [--any.key value ...]
    torchrun --nproc-per-node 2 benchmarks/plain_training.py OUT ...

Adds a line to OUT/metrics.jsonl after each epoch, as `nuciseg train` does, and keeps checkpoints in OUT.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from nuciseg.config import add_config_flags, config_from_args
from nuciseg.engine.checkpoint import CheckpointStore
from nuciseg.engine.datasets import open_training_set
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import EpochReport, train
from nuciseg.engine.network import stride_of
from nuciseg.tracking import METRICS_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    flags = add_config_flags(parser)
    args = parser.parse_args()
    config = config_from_args(flags, args)
    torch.set_num_threads(config.scale.cpus_per_worker or 1)
    place = Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if place.world_size > 1:
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)

    def on_epoch(report: EpochReport) -> None:
        if place.rank == 0:
            with (args.out / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(report.metrics)) + "\n")

    train(config, open_training_set(config, stride_of(config)), place, CheckpointStore(args.out), on_epoch)
    if place.world_size > 1:
        dist.barrier()  # nobody hangs up while another still talks
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
