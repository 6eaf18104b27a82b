"""Does a run on two workers learn the same as on one, and how much sooner?

    python benchmarks/workers.py --data.root DIR [--epochs 10] [--seeds 3]

Trains the same small U-Net with one worker and with two, one CPU each, in alternating runs (1 2 1 2 ...), each seed
once with either. Prints every run, then as the last line one JSON object: the validation cluster scores by number of
workers, whether the mean with two lies within the spread of the seeds with one, and the ratio of steps per second.
About 10 minutes on 2 cores with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nuciseg.tracking import METRICS_FILE, read_metrics

NETWORK = ("--model.kind", "unet", "--model.depth", "4", "--model.width", "8", "--optim.lr", "5e-3")
# Every image is a cluster; without saying so the score of a network that is trained so briefly jumps.
DECODING = ("--target.width_px", "5", "--target.decode.min_nuclei", "2", "--target.decode.border_share", "0.7")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    args = parser.parse_args()
    scores: dict[int, list[float]] = {1: [], 2: []}
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="nuciseg-workers-") as folder:
        for seed in range(args.seeds):
            for num_workers in (1, 2):
                score, rate = train(args.root, args.epochs, seed, num_workers, Path(folder))
                scores[num_workers].append(score)
                rates[num_workers].append(rate)
                print(
                    f"seed {seed}, {num_workers} worker(s): cluster score {score:.4f}, {rate:.2f} steps/s", flush=True
                )
    difference = abs(statistics.mean(scores[2]) - statistics.mean(scores[1]))
    spread = max(max(each) - min(each) for each in scores.values())
    result = {
        "cluster_score_1_worker": scores[1],
        "cluster_score_2_workers": scores[2],
        "difference_of_means": round(difference, 4),
        "spread_of_seeds": round(spread, 4),
        "within_spread": difference <= spread,
        "steps_per_s_1_worker": round(statistics.median(rates[1]), 3),
        "steps_per_s_2_workers": round(statistics.median(rates[2]), 3),
        "speedup": round(statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True)), 3),
    }
    print(json.dumps(result))


def train(
    root: Path,
    epochs: int,
    seed: int,
    num_workers: int,
    folder: Path,
    batch_size: int = 16,
    others: Sequence[str] = (),
) -> tuple[float, float]:
    """The mean validation cluster score of a run's last three epochs, and its median steps per second.

    One epoch's score alone jumps by a few clusters.
    """
    name = f"{num_workers}-workers-seed-{seed}"
    command = [
        *(sys.executable, "-m", "nuciseg.train", *NETWORK, *DECODING),
        *("--data.root", str(root), "--seed", str(seed), "--train.epochs", str(epochs), "--train.calibrate", "false"),
        *(
            "--scale.num_workers",
            str(num_workers),
            "--scale.cpus_per_worker",
            "1",
            "--data.batch_size",
            str(batch_size),
        ),
        *("--tracking.kind", "none", "--run.storage_path", str(folder), "--run.name", name),
        *others,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = read_metrics(folder / name / METRICS_FILE)
    score = statistics.mean(row["cluster_score"] for row in rows[-3:])
    return score, statistics.median(row["images_per_s"] for row in rows) / batch_size


if __name__ == "__main__":
    main()
