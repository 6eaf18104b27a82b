"""`cut`: labelled fields in, a data set of clusters out, and a sentence for what cannot be used."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from small_runs import open_data, run, small_config

from nuciseg.cli import run_verb
from nuciseg.cut import main
from nuciseg.data.formats import detect_format, labels, nucleus
from nuciseg.data.splits import split_records
from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder, write_nucleus_folder
from nuciseg.images import read_image

DRAWING = SyntheticConfig(num_train=6, num_test=2, mean_diameter_px=24.0)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn training fields and two for the test, with label images."""
    root = tmp_path_factory.mktemp("fields")
    write_labels_folder(DRAWING, root)
    return root


@pytest.fixture
def own_fields(fields: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(fields, tmp_path / "fields"))


def cut(*words: str | Path) -> int:
    """The exit code of the verb, in this process."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


def field_of(name: str) -> str:
    return re.sub(r"_\d{3}$", "", name)


def test_both_parts_are_cut_and_kept_apart(fields: Path, tmp_path: Path) -> None:
    out = tmp_path / "some where" / "clusters"
    command = [sys.executable, "-m", "nuciseg.cut", str(fields), "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert detect_format(out).NAME == "nucleus"
    for split, num_fields in (("train", 6), ("test", 2)):
        records = nucleus.read(out, split)
        own = {record.id for record in labels.read(fields, split)}
        assert {record.group for record in records} == {field_of(record.id) for record in records} <= own
        num_nuclei = sum(int(nucleus.load(record).labels_HW.max()) for record in records)
        used = len({record.group for record in records})
        said = f"{split}: {len(records)} clusters with {num_nuclei} nuclei, from {used} of {num_fields} fields"
        assert said in result.stdout.splitlines()
    assert re.search(r"^left out: \d+ cut by the image's edge$", result.stdout, re.M)
    assert "16 bit" not in result.stdout
    assert result.stdout.splitlines()[-1] == f"next: python -m nuciseg.train --data.root '{out}'"
    assert [path.name for path in out.parent.iterdir()] == ["clusters"], "nothing temporary is left"


def test_clusters_of_one_field_never_straddle_training_and_validation(fields: Path, tmp_path: Path) -> None:
    assert cut(fields, "--out", tmp_path / "out") == 0
    records = nucleus.read(tmp_path / "out", "train")
    assert len(records) > len({record.group for record in records})
    for seed in range(5):
        split = split_records(records, 0.3, seed)
        assert not {field_of(id) for id in split.train_ids} & {field_of(id) for id in split.validation_ids}


def test_fields_that_were_grouped_stay_so(own_fields: Path, tmp_path: Path) -> None:
    rows = [("id", "group"), *((f"drawn_{number:05d}", f"slide {number % 2}, left") for number in range(6))]
    with (own_fields / "train" / "groups.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert cut(own_fields, "--out", tmp_path / "out") == 0
    groups = {record.group for record in nucleus.read(tmp_path / "out", "train")}
    assert groups == {"slide 0, left", "slide 1, left"}


def test_a_diameter_resizes_all_fields_by_one_factor(
    fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cut(fields, "--out", tmp_path / "plain") == 0
    capsys.readouterr()
    assert cut(fields, "--out", tmp_path / "large", "--diameter", "60") == 0
    said = re.search(r"^scale (\S+): the median nucleus becomes 60 px wide$", capsys.readouterr().out, re.M)
    assert said
    scale = float(said[1])
    assert 1.5 < scale < 3.5
    assert cut(fields, "--out", tmp_path / "scaled", "--scale", scale) == 0
    large, scaled = (read_image(min((tmp_path / name / "train").glob("*.png"))) for name in ("large", "scaled"))
    assert abs(np.subtract(large.shape, scaled.shape)).max() <= 1
    areas = [
        np.bincount(nucleus.load(record).labels_HW.ravel())[1:] for record in nucleus.read(tmp_path / "large", "train")
    ]
    assert np.median(2 * np.sqrt(np.concatenate(areas) / np.pi)) == pytest.approx(60, rel=0.15)


@pytest.mark.parametrize("marking", ["drawn", "none"])
def test_a_network_trains_on_the_result(fields: Path, tmp_path: Path, marking: str) -> None:
    assert cut(fields, "--out", tmp_path / "out", "--marking", marking) == 0
    config = small_config(
        **{
            "data.root": str(tmp_path / "out"),
            "data.validation_fraction": 0.3,
            "augment.join": 0.5,
            "train.epochs": 1,
        }
    )
    data = open_data(config).training_data
    is_line_seen = False
    for planned in data.plan(0, 4):
        batch = data.load(planned, 0).batch
        assert batch is not None
        assert batch.targets_BKHW.any()
        is_line_seen |= bool((batch.images_BCHW.amax(dim=(1, 2, 3)) >= 3.0).any())
    assert is_line_seen == (marking == "drawn")
    history = run(config, tmp_path / "run").history
    assert len(history) == 1
    assert np.isfinite(history[0]["train_loss"])


def test_16_bit_fields_are_said_to_be_stretched(
    own_fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = own_fields / "train" / "images" / "drawn_00001.png"
    tifffile.imwrite(image.with_suffix(".tif"), read_image(image).astype(np.uint16) * 100)
    image.unlink()
    assert cut(own_fields, "--out", tmp_path / "out") == 0
    assert "16 bit: the light of 1 fields was stretched to 8 bit, each cluster by itself" in capsys.readouterr().out
    assert all(nucleus.load(record).image_HWC.dtype == np.uint8 for record in nucleus.read(tmp_path / "out", "train"))


def test_clusters_that_were_cut_before_get_another_size_and_marking(tmp_path: Path) -> None:
    write_nucleus_folder(SyntheticConfig(num_train=3, num_test=1), tmp_path / "clusters")
    out = tmp_path / "out"
    assert cut(tmp_path / "clusters", "--out", out, "--marking", "none", "--scale", "0.8") == 0
    for before, after in zip(nucleus.read(tmp_path / "clusters", "train"), nucleus.read(out, "train"), strict=True):
        old, new = nucleus.load(before), nucleus.load(after)
        assert new.labels_HW.max() == old.labels_HW.max()
        assert max(new.labels_HW.shape) == pytest.approx(0.8 * max(old.labels_HW.shape), abs=2)
        assert new.image_HWC.max() < 200 < old.image_HWC.max(), "no line, and no light of one"


def test_a_folder_without_parts_is_for_training(
    fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cut(fields / "test", "--out", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    only_test = tmp_path / "only"
    shutil.copytree(fields / "test", only_test / "test")
    capsys.readouterr()
    assert cut(only_test, "--out", tmp_path / "out2") == 0
    assert [path.name for path in (tmp_path / "out2").iterdir()] == ["test"]
    assert "nuciseg.train" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- bad input
def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_one_bad_field_among_many(own_fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(own_fields / "train" / "images" / "drawn_00002.png")
    out = tmp_path / "out"
    assert cut(own_fields, "--out", out, "--diameter", "30") == 2
    first, last = capsys.readouterr().err.splitlines()
    assert "drawn_00002.png cannot be read as an image" in first
    assert last == "nuciseg: 1 of 8 fields could not be cut (reasons above); the rest is done"
    found = {record.group for split in ("train", "test") for record in nucleus.read(out, split)}
    assert "drawn_00002" not in {record.group for record in nucleus.read(out, "train")}
    assert len(found) >= 4


def test_nothing_to_cut_writes_nothing(own_fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cut(own_fields, "--out", out, "--min-nuclei", "50") == 2
    assert re.fullmatch(
        r"nuciseg: None of 8 fields has a cluster to cut out \(\d+ fewer nuclei than asked for \(single ones\)\); "
        r"nothing was written\.\n",
        capsys.readouterr().err,
    )
    for path in own_fields.glob("*/masks/*"):
        damage(path)
    assert cut(own_fields, "--out", out) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "nuciseg: None of 8 fields could be read; nothing was written."
    assert cut(own_fields, "--out", out, "--diameter", "30") == 2
    assert "No field of train has a nucleus that is not cut by the edge" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["fields"]


def test_what_is_there_is_not_touched(fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert cut(fields, "--out", out) == 2
    assert capsys.readouterr().err == f"nuciseg: The folder {out} is not empty; choose a new one for the clusters.\n"
    assert cut(fields, "--out", out / "mine.txt") == 2
    assert "mine.txt is a file; choose a new one" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "mine"
    assert cut(fields, "--out", out / "mine.txt" / "below") == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    assert cut(fields, "--out", out) == 0, "an empty folder may be there"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scale", "0"), "argument --scale: '0' is not a number above 0"),
        (("--scale", "inf"), "argument --scale: 'inf' is not a number above 0"),
        (("--scale", "100"), "the scale would be 100; it must be from 0.05 to 20"),
        (("--scale", "2", "--diameter", "50"), "argument --diameter: not allowed with argument --scale"),
        (("--min-nuclei", "1.5"), "argument --min-nuclei: '1.5' is not a whole number from 1"),
        (("--gap", "-1"), "argument --gap: '-1' is not a number from 0"),
        (("--marking", "red"), "argument --marking: invalid choice: 'red'"),
        (("--format", "coco"), "There is no folder layout 'coco'"),
        (("--format", "nucleus"), "solutions does not exist"),
        (("--daimeter", "50"), "unknown argument '--daimeter'; did you mean '--diameter'?"),
    ],
)
def test_bad_settings_are_one_sentence(
    fields: Path, tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cut(fields, "--out", tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cut(tmp_path / "gone", "--out", tmp_path / "out") == 2
    assert "gone does not exist" in capsys.readouterr().err
    assert cut(tmp_path, "--out", tmp_path / "out") == 2
    assert "has no known layout, it holds nothing" in capsys.readouterr().err
    assert cut(tmp_path, "--out", tmp_path / "out", "--format", "labels") == 2
    assert "has neither a folder train nor a folder test" in capsys.readouterr().err
