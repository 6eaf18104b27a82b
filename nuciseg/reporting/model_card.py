"""The model card of weights that come with the package: a person's words, and figures that come from files alone."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuciseg.config import DataConfig
from nuciseg.engine.checkpoint import Checkpoint
from nuciseg.engine.datasets import open_split_samples
from nuciseg.engine.network import summarize_network
from nuciseg.errors import CheckpointError, ConfigError, DataError
from nuciseg.images import write_bytes
from nuciseg.reporting.study_arms import arms_of
from nuciseg.reporting.study_conclusions import said_total
from nuciseg.reporting.study_records import StudyRecord, read_kept
from nuciseg.targets import build_target

TABLE_HEAD = (
    "| images | clusters separated | nuclei found / true | AP .5 pooled | AP .5 per image | mean AP pooled "
    "| mean AP per image | border Dice |\n|---|---|---|---|---|---|---|---|"
)

NUCLEI_PERCENTS = (50, 70, 90)
NUCLEI_TABLE_HEAD = (
    "| images | nuclei found / true | AP .5 pooled | .7 | .9 | mean .5:.9 | AP .5 per image | .7 | .9 | mean .5:.9 |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class ImageFacts:
    """The training and validation images of a network, as they were read."""

    num_train: int
    num_validation: int
    content_hash: str
    pixel_type: str
    sides_px: tuple[int, int]
    diameters_px_N: NDArray[np.float64]  # of circles of the nuclei's areas, ascending
    nuclei_per_image: tuple[int, float, int]  # least, mean, most


@dataclass(frozen=True)
class CardFacts:
    """All that a card can say in figures. `reports` are evaluations' scores.json by split."""

    name: str
    checkpoint: Checkpoint
    num_parameters: int
    num_bytes: int
    images: ImageFacts
    reports: Mapping[str, Mapping[str, Any]]
    recipe: Path
    flags: Sequence[str]
    crossvalidation: Path | None = None


def measure_images(data: DataConfig, loaded: Checkpoint, content_hash: str) -> ImageFacts:
    """Measure the images that a checkpoint was trained and validated on.

    Raises CheckpointError where `data` are others: another split, or contents of another hash than `content_hash`, the
    evaluation's; DataError where they cannot be read.
    """
    samples, split = open_split_samples(data)
    if (split.hash, samples.path.name) != (loaded.split_hash, content_hash):
        raise CheckpointError(
            f"the images in {data.root or 'data.synthetic'} (split {split.hash}, content {samples.path.name}) are not "
            f"those of training and validation (split {loaded.split_hash}, content {content_hash}); name their folder"
        )
    areas_px = [np.unique(sample.labels_HW[sample.labels_HW > 0], return_counts=True)[1] for sample in samples]
    num_nuclei = [len(each) for each in areas_px]
    sides = [side for shape in samples.shapes for side in shape]
    return ImageFacts(
        num_train=len(split.train),
        num_validation=len(split.validation),
        content_hash=samples.path.name,
        pixel_type=str(samples[0].image_HWC.dtype),
        sides_px=(min(sides), max(sides)),
        diameters_px_N=np.sort(2 * np.sqrt(np.concatenate(areas_px) / np.pi)),
        nuclei_per_image=(min(num_nuclei), sum(num_nuclei) / len(num_nuclei), max(num_nuclei)),
    )


def write_card(facts: CardFacts, words: Path, path: Path) -> None:
    """Fill the figures into `words` and write the card.

    Raises ConfigError where `words` cannot be used, DataError where the cross-validation cannot.
    """
    try:
        template = string.Template(words.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{words}: the words of the model card cannot be read ({error.strerror}); write them"
        ) from None
    values = card_values(facts)
    try:
        card = template.substitute(values)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{words}: no such figure ({error}); there are {', '.join(sorted(values))}") from None
    write_bytes(path, re.sub(r"\n{3,}", "\n\n", card).encode())  # where there is no cross-validation to tell of


def card_values(facts: CardFacts) -> dict[str, str]:
    """The figures by the placeholder that stands for them."""
    config, images = facts.checkpoint.config, facts.images
    test = facts.reports["test"]
    smallest, largest = images.diameters_px_N[[0, -1]]
    usual = np.percentile(images.diameters_px_N, [5, 50, 95])
    least, mean, most = images.nuclei_per_image
    decode = config.target.decode.model_dump()
    return {
        "name": facts.name,
        "version": str(test["nuciseg"]),
        "architecture": summarize_network(config).name,
        "num_parameters": f"{facts.num_parameters:,}",
        "megabytes": f"{facts.num_bytes / 1e6:.1f}",
        "target": f"{config.target.kind}, {config.target.width_px} px wide",
        "num_images": str(images.num_train + images.num_validation),
        "num_train": str(images.num_train),
        "num_validation": str(images.num_validation),
        "split_hash": facts.checkpoint.split_hash,
        "split_seed": str(config.data.split_seed),
        "content_hash": images.content_hash,
        "seed": str(config.seed),
        "epoch": str(facts.checkpoint.progress.epoch),
        "epochs": str(config.train.epochs),
        "training_command": " ".join(
            [f"python -m nuciseg.train --config tune_configs/{facts.recipe.name} --data.root DIR", *facts.flags]
        ),
        "decoding": ", ".join(f"`{key}` {decode[key]}" for key in build_target(config.target).decoded_by),
        "decoding_chosen": "chosen on the validation images" if config.train.calibrate else "as configured",
        "scores": "\n".join([TABLE_HEAD, *_rows(facts.reports, _row)]),
        "nuclei_scores": "\n".join([NUCLEI_TABLE_HEAD, *_rows(facts.reports, _row_of_nuclei)]),
        "averaging": "\n".join(f"- {key}: {text}" for key, text in test["averaging"].items()),
        "num_test": str(test["images"]),
        "pixel_type": images.pixel_type,
        "sides_px": f"{images.sides_px[0]} to {images.sides_px[1]}",
        "diameters_px": f"{smallest:.0f} to {largest:.0f}",
        "usual_diameters_px": f"{usual[0]:.0f} to {usual[2]:.0f}",
        "median_diameter_px": f"{usual[1]:.0f}",
        "nuclei_per_cluster": f"{least} to {most} nuclei, {mean:.1f} on average",
        "min_nuclei": str(decode["min_nuclei"]),
        "crossvalidation": _crossvalidation(facts.crossvalidation) if facts.crossvalidation else "",
    }


def _rows(reports: Mapping[str, Mapping[str, Any]], row: Callable[[str, Mapping[str, Any]], str]) -> Iterator[str]:
    """Each split's own scores; of the test images also those of the baselines and with other drawn borders."""
    for split in ("validation", "test"):
        yield row(split, reports[split])
    for kind, prefix in (("by_marking", "drawn border "), ("baselines", "without network: ")):
        for name, scores in reports["test"][kind].items():
            yield row(f"test, {prefix}{name.replace('_', ' ')}", scores)


def _row(label: str, scores: Mapping[str, Any]) -> str:
    cells = [
        label,
        f"{scores['clusters_separated']} of {scores['clusters']}",
        f"{scores['nuclei_found']} / {scores['nuclei_true']}",
        *(f"{scores[f'ap_{average}']['0.50']:.3f}" for average in ("pooled", "per_image")),
        *(f"{scores[f'ap_mean_{average}']:.3f}" for average in ("pooled", "per_image")),
        f"{scores['border_dice']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def _row_of_nuclei(label: str, scores: Mapping[str, Any]) -> str:
    cells = [label, f"{scores['nuclei_found']} / {scores['nuclei_true']}"]
    for average in ("pooled", "per_image"):
        cells += [f"{scores[f'ap_{average}'][f'{percent / 100:.2f}']:.3f}" for percent in NUCLEI_PERCENTS]
        cells.append(f"{scores[f'ap_mean_to_90_{average}']:.3f}")
    return f"| {' | '.join(cells)} |"


def _crossvalidation(path: Path) -> str:
    """What the study keeps of a cross-validation. Raises DataError where the file is none."""
    record = read_kept(StudyRecord, path)
    arms = [arm for arm in arms_of(record) if arm.figures]
    if record.num_folds is None or not arms:
        raise DataError(f"{path} is no cross-validation; give what nuciseg.study keeps of one")
    lines = [
        f"In a cross-validation of {record.num_folds} parts (`tune_configs/{record.name}.yaml`) other networks,\n"
        f"trained for {record.epochs} epochs, separated clusters that they had not seen. The figures are of the last\n"
        "epoch, with the decoding as configured; of several seeds they are means:\n",
        "| network | clusters separated | by part |\n|---|---|---|",
    ]
    for arm in arms:
        parts = ", ".join(f"{separated:g} of {clusters}" for separated, clusters in arm.by_fold().values())
        lines.append(f"| {arm.name} | {said_total(arm)} | {parts} |")
    return "\n".join(lines)
