"""How long a training takes to find nuclei well: nuciseg's against StarDist's, on the same images and cores.

    pip install -e '.[bench,weights]'
    python benchmarks/time_to_accuracy.py DATA [--target 0.85] [--out DIR] [--any.key value ...]
    python benchmarks/time_to_accuracy.py DATA --only nuciseg
    python benchmarks/time_to_accuracy.py DATA --only stardist [--limit-minutes M]

Trains on DATA/train until the validation AP at IoU .5, the counts of all images added up, reaches the target. As in
StarDist's example 15 % of the images, drawn with seed 42, are for validation and in no training.

nuciseg: `tune_configs/fields.yaml`, ImageNet weights and all; its minutes are those in its log, with the validation
after each epoch and, in `vs_stardist_without_validation`, without. StarDist: its example's training from scratch
(400 epochs of 100 steps of 4 patches of 256 pixels, its augmentation, thresholds .5 and .4) by `stardist_user.py`;
only its steps are clocked, never its validation. It is cut off when it has taken 3 times as long as nuciseg, or
`--limit-minutes`; then `cut_off` is true and the ratio is what it would have been at least. `at_lower_targets` has the
same ratios at other APs, from the same trainings.

DIR keeps what was measured: nuciseg's run, which is taken up again where it was interrupted, and a line an epoch of
StarDist's, which begins anew. A part that has its result is not run again. Other flags go to `nuciseg.train`. The last
line is one JSON object, also in DIR/result.json. About 45 minutes on 2 cores with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alternating import all_cores, on_cores

from nuciseg.data.formats import labels as layout
from nuciseg.data.splits import held_out_by_stardist
from nuciseg.errors import NucisegError
from nuciseg.images import write_bytes
from nuciseg.tracking import METRICS_FILE, read_metrics
from nuciseg.types import Record

HERE = Path(__file__).parent
CONFIG = HERE.parent / "tune_configs" / "fields.yaml"
NUCISEG, STARDIST = "nuciseg", "stardist"
SCORE = "ap50_pooled"
LOWER_TARGETS = (0.7, 0.75, 0.8)  # looked up in the same logs: where a curve is flat, one target is a matter of luck
LIMIT = 3  # times nuciseg's minutes, when StarDist is cut off
POLL_S = 0.5


def main() -> None:
    arguments, others = parse_arguments()
    try:
        result = measure(arguments, others)
    except NucisegError as error:
        sys.exit(str(error))
    print(json.dumps(result))


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train/images and train/masks")
    parser.add_argument("--target", type=float, default=0.85, help="AP to be reached (0.85)")
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_accuracy"), help="folder of what was measured")
    parser.add_argument("--only", choices=[NUCISEG, STARDIST], help="train this one alone")
    parser.add_argument("--limit-minutes", type=float, help="when StarDist is cut off (3 times nuciseg's minutes)")
    parser.add_argument("--cores", type=int, default=len(all_cores()), help="cores of either (all)")
    parser.add_argument("--grid", type=int, default=2, choices=[1, 2], help="StarDist's grid (2, as in its example)")
    parser.add_argument("--every", type=int, default=1, help="epochs between StarDist's validations (1)")
    parser.add_argument("--epochs", type=int, default=400, help="StarDist's epochs (400)")
    parser.add_argument("--steps", type=int, default=100, help="StarDist's steps an epoch (100)")
    parser.add_argument("--seed", type=int, default=0, help="of either training (0)")
    parser.add_argument("--stardist-python", default=sys.executable, help="a Python that has StarDist (this one)")
    return parser.parse_known_args()


def measure(arguments: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    parts = divided(layout.read(arguments.data, "train"))
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{STARDIST}_grid_{arguments.grid}.jsonl"
    with on_cores(all_cores()[: arguments.cores]) as environment:
        if arguments.only != STARDIST and first_reaching(nuciseg_rows(out), arguments.target) is None:
            train_nuciseg(arguments, others, parts["validation"], environment)
        nuciseg = minutes_of(nuciseg_rows(out), arguments.target)
        if arguments.only != STARDIST and nuciseg is None:
            best = max(row[SCORE] for row in nuciseg_rows(out))
            sys.exit(f"nuciseg's AP came to {best:.4f} and not to {arguments.target}; lower --target, or train longer")
        if arguments.only != NUCISEG:
            limit = arguments.limit_minutes or (LIMIT * nuciseg["minutes"] if nuciseg is not None else None)
            if limit is None:
                sys.exit(f"{out} has no time of nuciseg to cut StarDist off by; run it first, or give --limit-minutes")
            if not is_done(read_metrics(log), arguments.target, limit):
                train_stardist(arguments, parts, limit, log, environment)
    result = combined(nuciseg_rows(out), read_metrics(log), arguments.target)
    result |= {"target": arguments.target, "cores": arguments.cores, "stardist_grid": arguments.grid}
    write_bytes(out / "result.json", json.dumps(result, indent=2).encode())
    return result


def divided(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The split of StarDist's example: of the images in the order of their names."""
    held_out = held_out_by_stardist([record.id for record in records])
    parts: dict[str, list[Record]] = {"train": [], "validation": []}
    for record in records:
        parts["validation" if record.id in held_out else "train"].append(record)
    return parts


# ------------------------------------------------------------------------------------------------------ the trainings
def train_nuciseg(
    arguments: argparse.Namespace, others: Sequence[str], validation: Sequence[Record], environment: Mapping[str, str]
) -> None:
    """Train until the target is reached, or to the end; a run that is already there is taken up again."""
    out: Path = arguments.out
    held_out = out / "validation.txt"
    write_bytes(held_out, "".join(f"{record.id}\n" for record in validation).encode())
    command = [sys.executable, "-m", "nuciseg.train"]
    if (out / NUCISEG / "config.yaml").exists():
        command += ["--resume", str(out / NUCISEG)]
    else:
        command += [
            *("--config", str(CONFIG), "--data.root", str(arguments.data), "--data.format", layout.NAME),
            *("--data.validation_list", str(held_out), "--seed", str(arguments.seed), "--tracking.kind", "none"),
            *("--scale.cpus_per_worker", str(arguments.cores), "--run.storage_path", str(out), "--run.name", NUCISEG),
            *others,
        ]
    num_shown = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        while process.poll() is None and first_reaching(nuciseg_rows(out), arguments.target) is None:
            num_shown = show(nuciseg_rows(out), num_shown)
            time.sleep(POLL_S)
        if process.poll() is None:
            process.terminate()  # SIGINT is ignored where a shell started this in the background
    reached = first_reaching(nuciseg_rows(out), arguments.target) is not None
    show(nuciseg_rows(out), num_shown)
    if process.returncode and not reached:
        sys.exit(process.returncode)


def show(rows: Sequence[Mapping[str, Any]], num_shown: int) -> int:
    for row in rows[num_shown:]:
        minutes = sum(seconds_of(each) for each in rows[: row["epoch"]]) / 60
        print(f"nuciseg, epoch {row['epoch']}: {minutes:.1f} minutes AP {row[SCORE]:.4f}", file=sys.stderr, flush=True)
    return len(rows)


def train_stardist(
    arguments: argparse.Namespace,
    parts: Mapping[str, Sequence[Record]],
    limit_minutes: float,
    log: Path,
    environment: Mapping[str, str],
) -> None:
    log.unlink(missing_ok=True)
    job = {
        "pairs": {
            part: [(str(record.image_path), str(record.label_paths[0])) for record in records]
            for part, records in parts.items()
        },
        "log": str(log),
        "limit_s": 60 * limit_minutes,
        **{key: getattr(arguments, key) for key in ("grid", "every", "epochs", "steps", "seed", "target")},
    }
    command = [arguments.stardist_python, str(HERE / "stardist_user.py"), "train"]
    done = subprocess.run(command, input=json.dumps(job) + "\n", text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


# --------------------------------------------------------------------------------------------------------- the report
def nuciseg_rows(out: Path) -> list[dict[str, Any]]:
    return read_metrics(out / NUCISEG / METRICS_FILE)


def seconds_of(row: Mapping[str, Any]) -> float:
    return float(row["train_s"]) + float(row["validation_s"])


def first_reaching(rows: Sequence[Mapping[str, Any]], target: float) -> int | None:
    """The place of the first epoch whose score is not below `target`."""
    return next((place for place, row in enumerate(rows) if row.get(SCORE, 0.0) >= target), None)


def minutes_of(rows: Sequence[Mapping[str, Any]], target: float) -> dict[str, Any] | None:
    """When nuciseg reached the target."""
    place = first_reaching(rows, target)
    if place is None:
        return None
    until = rows[: place + 1]
    return {
        "epoch": rows[place]["epoch"],
        "minutes": sum(seconds_of(row) for row in until) / 60,
        "minutes_without_validation": sum(row["train_s"] for row in until) / 60,
    }


def is_done(rows: Sequence[Mapping[str, Any]], target: float, limit_minutes: float) -> bool:
    """Whether StarDist's training ended, by its target or its time."""
    return first_reaching(rows, target) is not None or bool(rows and rows[-1]["train_s"] >= 60 * limit_minutes)


def combined(
    nuciseg: Sequence[Mapping[str, Any]], stardist: Sequence[Mapping[str, Any]], target: float
) -> dict[str, Any]:
    """The ratios at the target and at lower ones, where both were trained, and what they are made of."""
    result: dict[str, Any] = ratios(nuciseg, stardist, target)
    if stardist:
        last = stardist[-1] if (place := first_reaching(stardist, target)) is None else stardist[place]
        best = max(row.get(SCORE, 0.0) for row in stardist)
        minutes = round(last["train_s"] / 60, 4)
        result[STARDIST] = {"epoch": last["epoch"], "minutes": minutes, "best_ap": round(best, 4)}
    if (times := minutes_of(nuciseg, target)) is not None:
        result[NUCISEG] = {key: round(value, 4) for key, value in times.items()}
    lower = {f"{each:.2f}": ratios(nuciseg, stardist, each) for each in LOWER_TARGETS if each < target}
    return {**result, "at_lower_targets": {name: each for name, each in lower.items() if each}}


def ratios(
    nuciseg: Sequence[Mapping[str, Any]], stardist: Sequence[Mapping[str, Any]], target: float
) -> dict[str, float | bool]:
    """StarDist's minutes until the target, or until it was cut off, over nuciseg's; `train_s` of StarDist adds up."""
    times = minutes_of(nuciseg, target)
    if times is None or not stardist:
        return {}
    place = first_reaching(stardist, target)
    minutes = stardist[-1 if place is None else place]["train_s"] / 60
    return {
        "vs_stardist": round(minutes / times["minutes"], 3),
        "vs_stardist_without_validation": round(minutes / times["minutes_without_validation"], 3),
        "cut_off": place is None,
    }


if __name__ == "__main__":
    main()
