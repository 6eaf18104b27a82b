"""The page shows what the JSON holds, stands alone, and stays small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile

from nuciseg.config import DataConfig
from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder, write_nucleus_folder
from nuciseg.errors import DataError
from nuciseg.exploring.findings import Findings, explore, to_json
from nuciseg.exploring.page import MAX_PICTURES, number, percent, write_findings
from nuciseg.exploring.reading import open_data
from nuciseg.images import read_labels, write_labels_tiff

DRAWING = SyntheticConfig(num_train=6, num_test=3, mean_diameter_px=30.0, nuclei_per_cluster=(2, 3), seed=5)


def explored(root: Path | None, **settings: object) -> Findings:
    config = DataConfig.model_validate({"root": root, **settings})
    return explore(open_data(config), config)


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    root = tmp_path_factory.mktemp("clusters")
    write_nucleus_folder(DRAWING, root)
    return explored(root)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    root = tmp_path_factory.mktemp("fields")
    write_labels_folder(DRAWING, root, 128, 160)
    return explored(root)


def html(findings: Findings, folder: Path) -> str:
    write_findings(findings, folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


def rows(page: str) -> list[list[str]]:
    """The cells of every table row, as they are to be read."""
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]


@pytest.mark.parametrize("data", ["clusters", "fields"])
def test_clean_drawn_data_have_no_fault(data: str, request: pytest.FixtureRequest) -> None:
    findings: Findings = request.getfixturevalue(data)
    assert findings.faults == ()
    assert findings.pairs == ()


@pytest.mark.parametrize("data", ["clusters", "fields"])
def test_the_page_has_the_figures_of_the_json(data: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    findings: Findings = request.getfixturevalue(data)
    page = html(findings, tmp_path)
    told = json.loads(json.dumps(to_json(findings), allow_nan=False))
    shown = rows(page)
    by_split = [told["counts"][split] for split in ("train", "test", "all")]
    assert ["images", "6", "3", "9"] in shown
    assert ["nuclei", *(str(each["nuclei"]) for each in by_split)] in shown
    shares = [percent(each["border_share"]["touching_border"]) for each in by_split]
    assert ["border pixels, touching border", *shares] in shown
    for name, label in (("area_px", "area, px"), ("elongation", "elongation"), ("focus", "focus")):
        spread = told["spreads"]["test"][name]
        figures = [spread["num"], spread["mean"], *(spread["percentiles"][q] for q in ("0", "5", "50", "95", "100"))]
        assert [f"{label} (test)", *map(number, figures)] in shown
    for each in told["ceiling"]:
        name = each["target"].replace("_", " ") + (" *" if each["default"] else "")
        separated = f"{each['clusters_separated']} of {each['clusters']}"
        assert any(row[:4] == [name, str(each["width_px"]), each["split"], separated] for row in shown)
        assert any(row[:1] == [name] and row[5:6] == [f"{each['ap50_pooled']:.3f}"] for row in shown)
    for each in told["baselines"]:
        assert any(row[:2] == [each["name"].replace("_", " "), each["split"]] for row in shown)
    assert percent(told["padding"]["training"]) in page
    for key, value in told["recommendation"]["settings"].items():
        assert [key, str(value)] in [row[:2] for row in shown]
    for names in told["examples"].values():
        assert all(file in page for file in names)


def test_the_page_asks_for_nothing_from_anywhere(clusters: Findings, tmp_path: Path) -> None:
    page = html(clusters, tmp_path)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 20
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "<script" not in page


def test_the_numbers_are_right(fields: Findings) -> None:
    counts, spreads = fields.counts("test"), fields.spreads("test")
    labels = [sample.labels_HW for _, sample in fields.data.parts[1]]
    areas = np.concatenate([np.bincount(each.ravel())[1:] for each in labels])
    assert counts["nuclei"] == len(areas) == spreads["area_px"].num
    assert spreads["area_px"].percentiles["50"] == np.median(areas)
    assert spreads["height_px"].mean == 128
    assert spreads["background"].num == 3, "fields have a background, zeroed clusters have none"
    assert sum(counts["images_by_nuclei"].values()) == 3
    assert sum(int(size) * num for size, num in counts["clusters_by_nuclei"].items()) == len(areas)
    assert fields.padding is not None
    assert fields.padding.one_size == 0, "all are of one size"


def test_nothing_is_recommended_by_the_test_images(tmp_path: Path) -> None:
    write_labels_folder(DRAWING, tmp_path / "data", 128, 160)
    before = explored(tmp_path / "data").recommendation
    for path in (tmp_path / "data" / "test").rglob("*.tif"):  # nuclei of a third of the size
        tifffile.imwrite(path, np.ascontiguousarray(tifffile.imread(path)[::3, ::3]))
    assert before is not None
    assert explored(tmp_path / "data").recommendation == before


def test_padding_of_clusters(clusters: Findings) -> None:
    assert clusters.padding is not None
    sizes = [(look.height, look.width) for look in clusters.of("train")]
    full = max(height for height, _ in sizes) * max(width for _, width in sizes) * len(sizes)
    assert clusters.padding.one_size == pytest.approx(1 - sum(h * w for h, w in sizes) / full)
    assert 0 < clusters.padding.training < 1
    assert 0 < clusters.padding.whole_images < 1


def test_many_faults_show_some_pictures_and_all_names(tmp_path: Path) -> None:
    write_labels_folder(DRAWING.model_copy(update={"num_train": MAX_PICTURES + 4}), tmp_path / "data", 128, 160)
    for path in (tmp_path / "data" / "train" / "masks").iterdir():
        labels_HW = read_labels(path)
        rows_, columns = np.nonzero(labels_HW == np.bincount(labels_HW[labels_HW > 0]).argmax())
        labels_HW[int(rows_.mean()), int(columns.mean())] = 0
        write_labels_tiff(path, labels_HW)
    findings = explored(tmp_path / "data")
    assert findings.fault_counts == {"hole in a nucleus": (MAX_PICTURES + 4, MAX_PICTURES + 4)}
    page = html(findings, tmp_path)
    (section,) = re.findall(r"<h2>Faults</h2>(.*?)</section>", page, re.S)
    assert section.count("<img") == MAX_PICTURES
    assert "4 more files" in section
    for fault in findings.faults:
        assert fault.file in section


def test_drawn_data_need_no_folder() -> None:
    findings = explored(None, format="synthetic", synthetic={"num_train": 3, "num_test": 2})
    assert findings.counts()["images"] == 5
    assert findings.faults == ()
    assert findings.recommendation is not None
    assert "--data.root" not in findings.recommendation.command


def test_a_single_folder_counts_as_training_images(tmp_path: Path) -> None:
    write_nucleus_folder(DRAWING, tmp_path)
    data = open_data(DataConfig(root=tmp_path / "train"))
    assert [(part.split, len(part)) for part in data.parts] == [("train", 6)]
    with pytest.raises(DataError, match="does not exist"):
        open_data(DataConfig(root=tmp_path / "gone"))
