"""What a spot machine hears from AWS, and that Ray is told once."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
from metadata_service import Service, serving_metadata

from nuciseg.distributed import spot_notice


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with serving_metadata() as service:
        monkeypatch.setattr(spot_notice, "METADATA_URL", f"http://127.0.0.1:{service.server_address[1]}/latest")
        yield service


def test_no_notice(service: Service) -> None:
    assert spot_notice.seconds_left() is None


def test_a_notice_says_how_long(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    service.notice_s = 120.0
    left_s = spot_notice.seconds_left()
    assert left_s is not None
    assert 110 < left_s <= 120


def test_a_broken_answer_is_no_notice_and_the_next_is_asked_for(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.notice_s = 120.0
    for answer in ({}, [], None, {"time": "soon"}, {"time": None}, {"time": "2026-11-28T08:22:00"}):
        monkeypatch.setattr(spot_notice.json, "loads", lambda text, answer=answer: answer)
        assert spot_notice.seconds_left() is None


def test_where_nobody_answers_there_is_no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_notice, "METADATA_URL", "http://127.0.0.1:9/latest")
    assert spot_notice.seconds_left() is None


def test_ray_is_told_until_it_has_heard(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service.notice_s = 60.0
    told: list[float] = []
    monkeypatch.setattr(spot_notice.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(spot_notice, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(spot_notice, "drain", lambda left_s: told.append(left_s) or len(told) == 2)
    spot_notice.main()
    assert len(told) == 2


def test_one_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_notice.tempfile, "tempdir", str(tmp_path))
    with (tmp_path / spot_notice.LOCK_FILE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        spot_notice.main()  # returns
