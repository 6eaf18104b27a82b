"""Several nodes that do not share a folder: refused before the start, by what a file written here is to each of them.

The second node is a raylet in a mount namespace of its own, where an empty file system lies over the folder.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from played_nodes import can_hide_a_folder, node_without
from predict_verb import write_fields
from ray.cluster_utils import Cluster
from small_runs import wait_until

from nuciseg import predict, train, tune
from nuciseg.cli import run_verb
from nuciseg.config import Config, write_config
from nuciseg.distributed import newcomers, search
from nuciseg.distributed.cluster import quieten
from nuciseg.distributed.mirror import Mirror
from nuciseg.distributed.nodes import alive_nodes
from nuciseg.distributed.runs import check_storage
from nuciseg.distributed.storage import require_everywhere, require_shared, require_shared_by_joined
from nuciseg.distributed.worker import CONFIG_FILE
from nuciseg.errors import ResourceError

SMALL = ("--data.synthetic.num_train=8", "--data.synthetic.num_test=1", "--model.depth=2", "--model.width=4")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_hide_a_folder(), reason="needs root and unshare, to hide a folder from a node"),
]


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that the second of two nodes sees as an empty one of its own."""
    folder = tmp_path_factory.mktemp("hidden")
    ray.shutdown()
    memory = 128 * 2**20
    head = {"num_cpus": 1, "object_store_memory": memory, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    quieten(verbose=False)
    try:
        with node_without(folder, cluster.address):
            wait_until(lambda: sum(each["Alive"] for each in ray.nodes()) == 2, "the second node", limit_s=120)
            yield folder
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize("hides", [True, False])
def test_a_folder_is_probed_from_every_node(hidden: Path, tmp_path: Path, hides: bool) -> None:
    folder = (hidden if hides else tmp_path) / "not" / "yet" / "there"
    if not hides:
        require_shared(folder)
        assert list(folder.iterdir()) == []
        return
    with pytest.raises(ResourceError, match=r"run.storage_path is \S+/there, but node .* does not see what is written"):
        require_shared(folder)
    assert list(hidden.iterdir()) == [], "the folder made for the probe is gone"


def test_another_folder_of_the_same_name_is_not_the_same(hidden: Path) -> None:
    """Both nodes have the folder itself; what lies in it is not the same."""
    with pytest.raises(ResourceError, match=r"does not see what is written there; set run.storage_path to a folder"):
        require_shared(hidden)
    assert list(hidden.iterdir()) == []


def test_a_path_that_a_node_lacks_is_named(hidden: Path, tmp_path: Path) -> None:
    (hidden / "data").mkdir()
    require_everywhere({"data.root": tmp_path})
    with pytest.raises(ResourceError, match=r"data.root is \S+/data, but node .* has no such path; put it on"):
        require_everywhere({"data.root": hidden / "data"})
    config = Config().replaced({"data.root": str(hidden / "data"), "data.format": "labels"})
    with pytest.raises(ResourceError, match=r"data.root is \S+/data, but node .* has no such path; put it on"):
        check_storage(config, tmp_path, begun=True)  # as --resume does


def test_a_node_that_joined_without_a_file_is_named(hidden: Path, tmp_path: Path) -> None:
    (hidden / "clusters").mkdir()
    head, _ = alive_nodes()
    known = {head}
    with pytest.raises(ResourceError, match=r"data.root is \S+/clusters, but node .* has no such path; put it on"):
        require_shared_by_joined(tmp_path, {"data.root": hidden / "clusters"}, known)
    known = {head}
    require_shared_by_joined(None, {"data.root": tmp_path}, known)
    assert known == set(alive_nodes())


def test_a_search_asks_a_node_that_joins_for_its_data(
    hidden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a search in a bucket, which has no folder to ask for. What Tune calls as the search goes on is called here."""
    (hidden / "crops").mkdir()
    config = Config().replaced({"data.root": str(hidden / "crops"), "data.format": "labels"})
    monkeypatch.setattr(newcomers, "LOOK_S", 0.0)
    callbacks = search._callbacks(config, Mirror(tmp_path, below=False, uri="s3://bucket/search"), concurrent=1)
    (asking,) = [each for each in callbacks if isinstance(each, newcomers.Newcomers)]
    asking.setup()
    asking.on_step_end(0, [])
    head, joined = alive_nodes().items()
    with monkeypatch.context() as before:
        before.setattr(newcomers, "alive_nodes", lambda: dict([head]))
        asking.setup()
    with pytest.raises(ResourceError, match=rf"data.root is \S+/crops, but node {re.escape(joined[1])} has no such"):
        asking.on_step_end(1, [])


def refused(capsys: pytest.CaptureFixture[str], verb: object, *words: str | Path) -> str:
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: verb.main([str(word) for word in words]))  # type: ignore[attr-defined]
    said = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2, said
    assert len(said) == 1, said
    return said[0]


def test_a_resumed_search_asks_every_node_for_its_data(
    hidden: Path, tmp_path: Path, tiny_fields_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(tiny_fields_run.with_name("data"), hidden / "fields")
    settings = {"data.root": str(data), "data.format": "labels", "search.space": {"seed": {"choice": [1]}}}
    write_config(Config().replaced(settings), tmp_path / CONFIG_FILE)
    said = refused(capsys, tune, "--resume", tmp_path)
    assert said.startswith(f"nuciseg: data.root is {data}, but node "), said
    assert "has no such path; put it on" in said


def test_the_verbs_refuse_to_start(
    hidden: Path, tmp_path: Path, tiny_fields_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = hidden / "runs"
    for verb, more in ((train, ("--scale.num_workers", "2")), (tune, ("--search.space", '{"seed": {"choice": [1]}}'))):
        said = refused(capsys, verb, *SMALL, *more, "--scale.cpus_per_worker", "1", "--run.storage_path", storage)
        assert said.startswith(f"nuciseg: run.storage_path is {storage}, but node "), said
        assert "set run.storage_path to a folder that all nodes share" in said
        assert not storage.exists()
    fields = write_fields(tmp_path, 2)
    words = ("--checkpoint", tiny_fields_run, "--workers", "2")
    said = refused(capsys, predict, *words, *fields, "--out", hidden / "out")
    assert said.startswith(f"nuciseg: --out is {hidden / 'out'}, but node "), said
    unseen = write_fields(hidden / "unseen", 2)
    said = refused(capsys, predict, *words, *unseen, "--out", tmp_path / "out")
    assert f"INPUT in {hidden / 'unseen'} is " in said, said
