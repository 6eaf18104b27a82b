"""Searches of small networks on drawn clusters that take seconds, one after the other or of one trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_runs import small_config

from nuciseg.config import Config
from nuciseg.distributed.search import start_search
from nuciseg.distributed.trials import Trial

# At the first learning rate the network finds borders within an epoch, at the others its weights stay as drawn.
LEARNS, STAYS = 0.05, [1e-9, 1e-8, 1e-7]
EXPLODES = 90.0
PLAIN = {
    "search.sampler": "grid",
    "search.scheduler": "none",
    "search.space": {"optim.lr": {"choice": [LEARNS, *STAYS]}},
    "tracking.kind": "none",
    "train.ema_decay": None,
    "data.synthetic.num_train": 60,
    "data.batch_size": 2,
    "augment.enabled": False,
    "model.dropout": 0.0,
    "schedule.kind": "constant",
    "loss.weights.dice": 4.0,
}


def run_search(folder: Path, **changes: Any) -> tuple[Config, list[Trial]]:
    config = small_config(**{**PLAIN, **changes})
    return config, start_search(config, folder, verbose=False)
