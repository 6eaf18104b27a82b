"""What the tests that lose nodes share: one played cluster a file, on which nothing runs when a test begins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from played_nodes import PlayedCluster, played_cluster


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlayedCluster]:
    with played_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(played: PlayedCluster) -> Iterator[PlayedCluster]:
    yield played
    played.end_drivers()
