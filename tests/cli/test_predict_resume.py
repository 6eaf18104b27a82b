"""A batch that was cut short goes on with `--resume`, and never as a mixture of two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from predict_verb import num_masks, predict, read_summary_rows, write_fields
from small_runs import wait_until

from nuciseg.cli import INTERRUPTED


def snapshot(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("field_*")}


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_fields(tmp_path_factory.mktemp("batch"), 3)


@pytest.fixture
def two_of_three(tiny_fields_run: Path, fields: list[Path], tmp_path: Path) -> Path:
    """Where an earlier run predicted the first two fields."""
    assert predict("--checkpoint", tiny_fields_run, *fields[:2], "--out", tmp_path / "out") == 0
    return tmp_path / "out"


def test_only_the_rest_is_done_and_the_table_has_all(
    tiny_fields_run: Path, fields: list[Path], two_of_three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(two_of_three)
    first_rows = read_summary_rows(two_of_three)
    capsys.readouterr()
    words = ["--checkpoint", tiny_fields_run, fields[0].parent, "--out", two_of_three, "--resume"]
    assert predict(*words) == 0
    said = capsys.readouterr().out.splitlines()
    rows = read_summary_rows(two_of_three)
    assert said[0] == "2 of 3 images were finished before"
    assert len(said) == 3
    assert said[1].startswith(f"{fields[2]}: ")
    assert said[2].startswith(f"{sum(int(row['num_nuclei']) for row in rows)} nuclei in 3 images")
    assert rows[:2] == first_rows
    assert [row["file"] for row in rows] == [str(path) for path in fields]
    assert before.items() <= snapshot(two_of_three).items(), "what was finished is not touched"
    complete = snapshot(two_of_three)
    assert predict(*words) == 0, "after all"
    assert capsys.readouterr().out.startswith("3 of 3 images were finished before")
    assert snapshot(two_of_three) == complete
    assert read_summary_rows(two_of_three) == rows


def test_after_nothing_all_is_done(tiny_fields_run: Path, fields: list[Path], tmp_path: Path) -> None:
    assert predict("--checkpoint", tiny_fields_run, fields[0], "--out", tmp_path / "out", "--resume") == 0
    assert [row["status"] for row in read_summary_rows(tmp_path / "out")] == ["done"]


def test_images_that_failed_or_lack_a_file_are_done_again(
    tiny_fields_run: Path, fields: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.tif"
    bad.write_bytes(fields[2].read_bytes()[:500])
    words = ["--checkpoint", tiny_fields_run, fields[0], fields[1], bad, "--out", tmp_path / "out"]
    assert predict(*words) == 2
    assert [row["status"] for row in read_summary_rows(tmp_path / "out")] == ["done", "done", "failed"]
    shutil.copy(fields[2], bad)
    (tmp_path / "out" / "field_01_measurements.csv").unlink()
    before = snapshot(tmp_path / "out")
    assert predict(*words, "--resume") == 0
    assert [row["status"] for row in read_summary_rows(tmp_path / "out")] == ["done"] * 3
    after = snapshot(tmp_path / "out")
    assert {name for name, time in after.items() if before.get(name) != time} == {
        "field_01_masks.tif", "field_01_overlay.png", "field_01_measurements.csv",
    }  # fmt: skip


def test_rows_of_images_that_were_not_asked_for_stay(
    tiny_fields_run: Path, fields: list[Path], two_of_three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert predict("--checkpoint", tiny_fields_run, fields[2], "--out", two_of_three, "--resume") == 0
    assert {row["file"] for row in read_summary_rows(two_of_three)} == {str(path) for path in fields}
    assert "nuclei in 1 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--diameter", "9"), "with diameter None, not 9 px"),
        (("--pixel-size", "0.5"), "with pixel_size_um None, not 0.5"),
        (("--plane", "max"), "with plane None, not max"),
        (("--channel", "1"), "with channel None, not 1"),
        (("--tile-px", "256"), "with tile_px 2048, not 256"),
    ],
)
def test_other_settings_are_refused(
    tiny_fields_run: Path,
    fields: list[Path],
    two_of_three: Path,
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(two_of_three)
    assert predict("--checkpoint", tiny_fields_run, *fields, "--out", two_of_three, "--resume", *words) == 2
    said = capsys.readouterr().err
    assert f"nuciseg: the images in {two_of_three} were predicted {message}; give the same again, " in said
    assert said.count("\n") == 1
    assert snapshot(two_of_three) == before


def test_another_checkpoint_is_refused_and_a_moved_one_is_none(
    tiny_fields_run: Path,
    tiny_run: Path,
    fields: list[Path],
    two_of_three: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*fields, "--out", two_of_three, "--resume"]
    assert predict("--checkpoint", tiny_run, *words) == 2
    said = capsys.readouterr().err
    assert f"were predicted with the checkpoint {tiny_fields_run}" in said
    assert f"not {tiny_run}" in said
    shutil.copytree(tiny_fields_run, tmp_path / "moved")
    assert predict("--checkpoint", tmp_path / "moved", *words) == 0


def test_more_outputs_are_no_other_settings(tiny_fields_run: Path, fields: list[Path], two_of_three: Path) -> None:
    assert predict("--checkpoint", tiny_fields_run, *fields, "--out", two_of_three, "--resume", "--rois") == 0
    assert len(list(two_of_three.glob("*_rois.zip"))) == 3


@pytest.mark.parametrize("content", [None, "", "[]", '{"checkpoint": "x"}'])
def test_a_folder_that_does_not_say_what_it_holds_is_refused(
    tiny_fields_run: Path,
    fields: list[Path],
    two_of_three: Path,
    content: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (two_of_three / "predict.json").unlink()
    if content is not None:
        (two_of_three / "predict.json").write_text(content)
    assert predict("--checkpoint", tiny_fields_run, *fields, "--out", two_of_three, "--resume") == 2
    said = capsys.readouterr().err
    assert "predict.json does not say what the images in" in said
    assert said.count("\n") == 1


def test_without_resume_a_batch_begins_anew(tiny_fields_run: Path, fields: list[Path], two_of_three: Path) -> None:
    assert predict("--checkpoint", tiny_fields_run, fields[2], "--out", two_of_three, "--diameter", "9") == 0
    assert [row["file"] for row in read_summary_rows(two_of_three)] == [str(fields[2])]
    assert json.loads((two_of_three / "predict.json").read_text())["diameter"] == "9 px"


# ---------------------------------------------------------------------------------------------- whose results these are
@pytest.mark.parametrize("resume", [["--resume"], []], ids=["resumed", "anew"])
def test_another_image_of_the_same_name_is_refused(
    tiny_fields_run: Path,
    fields: list[Path],
    two_of_three: Path,
    tmp_path: Path,
    resume: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (other,) = write_fields(tmp_path / "other", 1)
    before = snapshot(two_of_three)
    capsys.readouterr()
    assert predict("--checkpoint", tiny_fields_run, other, "--out", two_of_three, *resume) == 2
    assert capsys.readouterr().err == (
        f"nuciseg: {two_of_three / 'field_00_masks.tif'} is of {fields[0]} and would be replaced by that of {other}; "
        "choose another --out\n"
    )
    assert snapshot(two_of_three) == before
    assert predict("--checkpoint", tiny_fields_run, *fields[:2], "--out", two_of_three) == 0, "its own are replaced"
    assert snapshot(two_of_three) != before
    for path in snapshot(two_of_three):
        (two_of_three / path).unlink()
    assert predict("--checkpoint", tiny_fields_run, other, "--out", two_of_three, *resume) == 0, "nothing is replaced"


def test_the_same_image_by_another_name_is_the_same(
    tiny_fields_run: Path, fields: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, out = tmp_path / "home", tmp_path / "home" / "out"
    shutil.copytree(fields[0].parent, home / "images")
    (tmp_path / "link").symlink_to(home)
    words = ["--checkpoint", tiny_fields_run, "--out", out, "--resume"]
    monkeypatch.chdir(home)
    assert predict(*words, "images/field_00.tif", "images/field_01.tif") == 0
    complete = snapshot(out)
    for folder, named in ((home, home / "images"), (tmp_path, Path("link/images")), (tmp_path, Path("home/images"))):
        monkeypatch.chdir(folder)
        assert predict(*words, named / "field_00.tif") == 0
        assert snapshot(out) == complete
        first, second = (row["file"] for row in read_summary_rows(out))
        assert first == str(named / "field_00.tif")
        assert Path(second).resolve() == home / "images" / "field_01.tif", "named from elsewhere before"
    assert predict(*words[:-1], named) == 0, "anew"
    assert len(read_summary_rows(out)) == 3


def test_images_that_were_moved_with_their_results_are_the_same(
    tiny_fields_run: Path, fields: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(fields[0].parent, tmp_path / "before" / "images")
    words = ["--checkpoint", tiny_fields_run, "images", "--out", "out", "--resume"]
    monkeypatch.chdir(tmp_path / "before")
    assert predict(*words) == 0
    complete = snapshot(Path("out"))
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path / "after")
    assert predict(*words) == 0
    assert snapshot(Path("out")) == complete


ENDS = {
    signal.SIGINT: (INTERRUPTED, "nuciseg: interrupted; what was finished is kept\n"),
    signal.SIGTERM: (143, "nuciseg: asked to stop; what was finished is kept, and --resume goes on\n"),
}


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda by: by.name)
def test_an_interrupted_batch_goes_on(by: signal.Signals, tiny_fields_run: Path, tmp_path: Path) -> None:
    paths = write_fields(tmp_path / "many", 12, side_px=400)
    out = tmp_path / "out"
    words = ["--checkpoint", str(tiny_fields_run), str(tmp_path / "many"), "--out", str(out)]

    def is_within_a_later_image() -> bool:
        begun = {path.name.removesuffix("_masks.tif") for path in out.glob(".*.tmp/*_masks.tif")}
        done = {path.name.removesuffix("_masks.tif") for path in out.glob("*_masks.tif")}
        return len(done) >= 2 and bool(begun - done)

    process = subprocess.Popen(
        [sys.executable, "-m", "nuciseg.predict", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # Whoever runs the tests in the background ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_until(lambda: is_within_a_later_image() or process.poll() is not None, "two images and part of another")
        process.send_signal(by)
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    whole = sorted(out.glob("*_masks.tif"))
    assert 2 <= len(whole) < 12, errors
    rows = read_summary_rows(out)
    if by in ENDS:
        assert (process.returncode, errors) == ENDS[by]
        assert not list(out.glob(".*")), "no temporary files"
        assert len(whole) - 1 <= len(rows) <= len(whole)
        assert len(said.splitlines()) == len(rows)
    assert rows, "the summary is written before the end, too"
    for row in rows:
        assert num_masks(out / f"{Path(row['file']).stem}_masks.tif") == int(row["num_nuclei"]) > 0
    assert predict(*words, "--resume") == 0
    assert [row["file"] for row in read_summary_rows(out)] == [str(path) for path in paths]
    assert [row["status"] for row in read_summary_rows(out)] == ["done"] * 12
