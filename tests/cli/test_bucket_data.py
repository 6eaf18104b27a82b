"""The verbs with a data set in a bucket of a real server of S3, or of Google's storage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from gcs_server import serving_gcs
from s3_server import make_bucket, upload_folder, use_server

from nuciseg import evaluate, explore, train, tune
from nuciseg.buckets import BucketFolder
from nuciseg.cli import run_verb
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder

QUICK = ["--data.crop_px=64", "--model.depth=2", "--model.width=4", "--train.epochs=1", "--tracking.kind=none"]


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    use_server(server, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return make_bucket(server)


def answer(main: Callable[[list[str]], None], *words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main(list(words)))
    return int(str(exit_.value.code))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_run_on_a_bucket_is_trained_evaluated_and_explored(
    scheme: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nucleus_folder(SyntheticConfig(num_train=6, num_test=2, mean_diameter_px=20.0), tmp_path / "data")
    if scheme == "s3":
        upload_folder(tmp_path / "data", f"s3://{bucket}/nuclei")
        run_on(f"s3://{bucket}/nuclei", tmp_path, capsys)
        return
    with serving_gcs(monkeypatch) as uri:
        nuclei = BucketFolder(f"{uri}/nuclei")
        for path in (tmp_path / "data").rglob("*.*"):
            nuclei.upload(path, path.relative_to(tmp_path / "data").as_posix())
        run_on(f"{uri}/nuclei", tmp_path, capsys)


def run_on(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ("--data.root", uri)
    assert answer(train.main, *root, *QUICK, "--run.name", "there") == 0
    assert answer(train.main, "--data.root", "data", *QUICK, "--run.name", "here") == 0
    splits = [json.loads((tmp_path / "runs" / name / "split.json").read_text()) for name in ("here", "there")]
    assert splits[0] == splits[1]
    written = yaml.safe_load((tmp_path / "runs" / "there" / "config.yaml").read_text())
    assert written["data"]["root"] == root[1], "another node fetches it for itself"
    assert answer(evaluate.main, "--checkpoint", "runs/there", "--split", "test", "--out", "scores") == 0
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["data"]["root"] == root[1]
    assert answer(explore.main, root[1]) == 0
    assert "8 images (6 train, 2 test)" in capsys.readouterr().out


@pytest.mark.parametrize("main", [train.main, tune.main, explore.main])
def test_what_cannot_be_fetched_ends_in_one_sentence(
    main: Callable[[list[str]], None], bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["s3://no-such-bucket/x"] if main is explore.main else ["--data.root", "s3://no-such-bucket/x"]
    assert answer(main, *words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "nuciseg: s3://no-such-bucket/x: there is no bucket 'no-such-bucket'; check its name, or make it",
    ]
    assert not list(tmp_path.iterdir()), "no run folder is left behind"
