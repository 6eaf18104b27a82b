"""The page of findings: every figure of the JSON, with drawings and small pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nuciseg.data.formats import CLUSTER_FORMATS
from nuciseg.exploring.ceilings import MAX_PIXELS
from nuciseg.exploring.duplicates import Pair
from nuciseg.exploring.faults import KINDS, Fault
from nuciseg.exploring.figures import draw_ceilings, draw_light, draw_nuclei, draw_sizes
from nuciseg.exploring.findings import Findings, Spread, score_figures
from nuciseg.exploring.label_faults import STRAIGHT_PX
from nuciseg.exploring.pictures import example, fault_picture, same
from nuciseg.metrics import Scores
from nuciseg.pages import Block, Chapter, Note, Picture, Pictures, Table, Text, write_page

NUM_EXAMPLES = 4
MAX_PICTURES = 12  # of one kind of fault; a page of all would be slow
MAX_NAMES = 100
SPREAD_COLUMNS = ("", "number", "mean", "min", "5 %", "median", "95 %", "max")
SCORE_COLUMNS = ("clusters separated", "cluster score", "AP .5", "AP .7", "AP .9", "AP .5 per image")


def write_findings(findings: Findings, path: Path) -> None:
    """Write the page. Raises ResourceError where that is not possible."""
    name = findings.data.root.resolve().name if findings.data.root else "drawn clusters"
    chapters = [
        Chapter("In short", _overview(findings)),
        Chapter("Images", _images(findings)),
        Chapter("Nuclei", _nuclei(findings)),
        Chapter("Examples", _examples(findings)),
        Chapter("Faults", list(_faults(findings))),
        Chapter("Duplicates and leaks", list(_duplicates(findings))),
        Chapter("The ceiling", _ceiling(findings)),
        Chapter("Without learning", _baselines(findings)),
        Chapter("Recommendation", list(_recommendation(findings))),
    ]
    write_page(path, f"{name}: {findings.data.num_images} images in the {findings.data.format_name} layout", chapters)


def number(value: float | None) -> str:
    """A figure as it is shown: four digits, whole numbers as they are."""
    if value is None:
        return "–"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _overview(findings: Findings) -> list[Block]:
    # Cut-out clusters fill their image, so that nearly all of their nuclei are at its edge.
    is_cut_out = findings.data.format_name in CLUSTER_FORMATS
    at_edge = [] if is_cut_out else [("nuclei_at_edge", "of them at the image's edge")]
    columns = ["", *findings.splits, *(["all"] if len(findings.splits) > 1 else [])]
    counts = [findings.counts(split) for split in (*findings.splits, *([None] if len(findings.splits) > 1 else []))]
    rows = [
        [label, *(number(each[key]) for each in counts)]
        for key, label in (
            ("images", "images"),
            ("nuclei", "nuclei"),
            *at_edge,
            ("lines", "lines between two nuclei"),
            ("long_lines", f"of them {STRAIGHT_PX:.0f} px and longer"),
            ("straight_lines", "of them straight"),
        )
    ]
    rows += [
        [f"border pixels, {kind.replace('_', ' ')}", *(percent(each["border_share"].get(kind, 0.0)) for each in counts)]
        for kind in (counts[-1]["border_share"] if counts else {})
    ]
    rows.append(["pixels to be ignored", *(percent(each["ignored_share"]) for each in counts)])
    blocks: list[Block] = [Table(columns, rows)] if counts else []
    num_faults = len(findings.faults)
    if num_faults:
        kinds = ", ".join(f"{kind} {found}" for kind, (found, _) in findings.fault_counts.items())
        blocks.append(Note(f"{num_faults} faults: {kinds}.", "warning"))
    else:
        blocks.append(Note("No fault was found in the labels.", "good"))
    if leaking := _num_leaks(findings):
        blocks.append(Note(f"{leaking} near-duplicates or groups stand on both sides of a split.", "warning"))
    if findings.recommendation:
        blocks.append(Note(findings.recommendation.command))
    return blocks


def _num_leaks(findings: Findings) -> int:
    leaks = findings.leaks
    return len(leaks.groups) + len(leaks.train_test) + len(leaks.train_validation)


def _images(findings: Findings) -> list[Block]:
    if not findings.looks:
        return [Text("None could be read.")]
    names = {
        "height_px": "height, px",
        "width_px": "width, px",
        "brightness": "brightness",
        "background": "background",
        "focus": "focus",
    }
    blocks: list[Block] = [_spreads(findings, names)]
    padding = findings.padding
    if padding is not None:
        blocks += [
            Text(
                f"Padding is {percent(padding.one_size)} of the pixels if every image is padded to the size of the "
                f"largest, {percent(padding.training)} in training, where images of like size share a batch "
                f"({padding.batch_size} images, canvases up to {padding.crop_px} px), and "
                f"{percent(padding.whole_images)} when whole images are evaluated."
            )
        ]
    blocks += [
        Pictures([draw_sizes(findings), *draw_light(findings)]),
        Text(
            "Brightness is the median within the nuclei as a share of full scale, background the median outside, both "
            "without zeroed background and saturated pixels. Focus is the variance of the Laplacian of the smoothed "
            "image within the nuclei over the squared mean there "
            "(Pech-Pacheco et al. 2000; LAPV of Pertuz, Puig & Garcia 2013); noise of faint images raises it."
        ),
    ]
    return blocks


def _nuclei(findings: Findings) -> list[Block]:
    if not findings.looks:
        return [Text("None could be read.")]
    names = {
        "nuclei_per_image": "nuclei in an image",
        "nuclei_per_cluster": "nuclei in a cluster",
        "area_px": "area, px",
        "diameter_px": "diameter, px",
        "elongation": "elongation",
        "touching_px": "touching length, px",
    }
    counts = {split: findings.counts(split)["clusters_by_nuclei"] for split in findings.splits}
    sizes = sorted({size for each in counts.values() for size in each}, key=int)
    rows = [[size, *(number(each.get(size, 0)) for each in counts.values())] for size in sizes[:MAX_PICTURES]]
    more = f" (up to {sizes[MAX_PICTURES - 1]}; the most are {sizes[-1]})" if len(sizes) > MAX_PICTURES else ""
    return [
        _spreads(findings, names),
        Table(["nuclei", *counts], rows, f"Clusters by how many nuclei hang together{more}"),
        Pictures(draw_nuclei(findings)),
        Text(
            "A cluster is a group of nuclei that touch side by side, one that touches none included. Elongation is the "
            "long by the short axis of the ellipse with the same second moments, diameter that of the disk of the same "
            "area."
        ),
    ]


def _spreads(findings: Findings, names: dict[str, str]) -> Table:
    splits: list[str | None] = [*findings.splits] if len(findings.splits) > 1 else [None]
    rows = []
    for key, name in names.items():
        for split in splits:
            spread = findings.spreads(split)[key]
            if spread.num:
                rows.append([f"{name} ({split})" if split else name, *_spread_row(spread)])
    return Table(SPREAD_COLUMNS, rows)


def _spread_row(spread: Spread) -> list[str]:
    shown = (spread.percentiles[q] for q in ("0", "5", "50", "95", "100"))
    return [number(spread.num), number(spread.mean), *map(number, shown)]


def _examples(findings: Findings) -> list[Block]:
    blocks: list[Block] = []
    for name, looks in findings.examples(NUM_EXAMPLES).items():
        blocks += [
            Text(f"{name.capitalize()}:"),
            Pictures([example(findings.data, look) for look in looks]),
        ]
    return blocks or [Text("There is no image with nuclei.")]


def _faults(findings: Findings) -> Iterator[Block]:
    if not findings.faults:
        yield Text(f"None found. Looked for: {', '.join(KINDS)}.")
        return
    counts = findings.fault_counts
    rows = [[kind, number(found), number(files)] for kind, (found, files) in counts.items()]
    yield Table(["kind", "faults", "files"], rows)
    missing = [kind for kind in KINDS if kind not in counts]
    if missing:
        yield Text(f"Not found: {', '.join(missing)}.")
    for kind, (found, files) in counts.items():
        yield Note(f"{kind}: {found} in {files} files. {KINDS[kind]}", "warning")
        yield from _fault_blocks(findings, [fault for fault in findings.faults if fault.kind == kind])


def _fault_blocks(findings: Findings, faults: Sequence[Fault]) -> Iterator[Block]:
    """Pictures of the files with the worst faults, then the names of the others."""
    by_file: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        by_file.setdefault((fault.split, fault.file), []).append(fault)
    pictures: list[Picture] = []
    untold: list[Fault] = []
    for each in by_file.values():
        picture = fault_picture(findings.data, each) if len(pictures) < MAX_PICTURES else None
        if picture is None:
            untold.append(each[0])
        else:
            pictures.append(picture)
    if pictures:
        yield Pictures(pictures)
    if untold:
        shown = untold[:MAX_NAMES]
        rest = len(untold) - len(shown)
        more = f"; {rest} more stand in the JSON (--json)" if rest else ""
        heading = f"{len(untold)} more files{more}" if pictures else f"{len(untold)} files{more}"
        yield Table(["file", "what"], [[fault.file, fault.what] for fault in shown], heading)


def _duplicates(findings: Findings) -> Iterator[Block]:
    leaks = findings.leaks
    if not findings.pairs and not leaks.groups:
        yield Text(
            "No two images show the same, turned or mirrored ones included, no two share a part to the last bit, and "
            "no group is in both splits."
        )
        return
    if leaks.groups:
        names = ", ".join(leaks.groups[:MAX_NAMES])
        yield Note(f"{len(leaks.groups)} groups (fields) are both in train and in test: {names}.", "warning")
    if leaks.train_test:
        yield Note(f"{len(leaks.train_test)} near-duplicates are in train and in test.", "warning")
    if leaks.train_validation:
        yield Note(
            f"{len(leaks.train_validation)} near-duplicates stand on both sides of the default split into training and "
            "validation; give both images one group (groups.csv of the labels layout).",
            "warning",
        )
    apart = sum(not pair.same_group and not pair.crosses_splits for pair in findings.pairs)
    yield Text(
        f"{len(findings.pairs)} pairs of images show the same or share a part; {apart} of one split are in different "
        "groups, so that a split may divide them."
    )
    yield Pictures(
        [same(findings.data, pair.first, pair.second, _pair_caption(pair)) for pair in findings.pairs[:MAX_PICTURES]]
    )
    if len(findings.pairs) > MAX_PICTURES:
        rest = findings.pairs[MAX_PICTURES : MAX_PICTURES + MAX_NAMES]
        rows = [[_pair_caption(pair)] for pair in rest]
        yield Table(["pair"], rows, f"{len(findings.pairs) - MAX_PICTURES} more pairs")


def _pair_caption(pair: Pair) -> str:
    turned = ", turned" if pair.turned else ""
    how = f"{percent(pair.likeness)} shared" if pair.partly else f"likeness {pair.likeness:.2f}{turned}"
    return f"{pair.first.file} and {pair.second.file} ({how})"


def _ceiling(findings: Findings) -> list[Block]:
    if not findings.ceilings:
        return [Text("There are no labels to encode.")]
    rows = []
    for split in findings.splits:
        for ceiling in (each for each in findings.ceilings if each.split == split):
            name = ceiling.target.kind.replace("_", " ") + (" *" if ceiling.is_default else "")
            rows.append([name, number(ceiling.target.width_px), split, *_score_row(ceiling.scores)])
    return [
        Text(
            "The score of a network that makes no mistake on any pixel: the true labels are encoded as each target and "
            "decoded again, with the default decoding. What is missing to 1 is lost on the way there and back; the "
            "decoding that is chosen on validation after training can win back a little of it. "
            f"{_scored(findings)} AP pooled over all nuclei; * the default width."
        ),
        Table(["target", "width, px", "split", *SCORE_COLUMNS], rows),
        Pictures([draw_ceilings(findings)]),
    ]


def _baselines(findings: Findings) -> list[Block]:
    if not findings.baselines:
        return [Text("There is nothing to score.")]
    rows = [[each.name.replace("_", " "), each.split, *_score_row(each.scores)] for each in findings.baselines]
    return [
        Text(f"What no network at all would score. {_scored(findings)}"),
        Table(["method", "split", *SCORE_COLUMNS], rows),
    ]


def _scored(findings: Findings) -> str:
    num_scored = sum(findings.chosen.values())
    if num_scored == findings.data.num_images:
        return f"All {num_scored} images."
    return f"{num_scored} images, drawn at random: together about {MAX_PIXELS / 1e6:.0f} million pixels."


def _score_row(scores: Scores) -> list[str]:
    figures = score_figures(scores)
    shown = ("cluster_score", "ap50_pooled", "ap70_pooled", "ap90_pooled", "ap50_per_image")
    return [f"{scores.clusters_separated} of {scores.clusters}", *(f"{figures[key]:.3f}" for key in shown)]


def _recommendation(findings: Findings) -> Iterator[Block]:
    recommendation = findings.recommendation
    if recommendation is None:
        yield Text("None: there is no nucleus to train on.")
        return
    rows = [[key, str(value), recommendation.reasons[key]] for key, value in recommendation.settings.items()]
    yield Table(["setting", "value", "why"], rows)
    yield Note(recommendation.command, "good")
