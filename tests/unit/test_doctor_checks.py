"""What `doctor` makes of what nodes say: the line where all is well, and the one that says what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nuciseg.config import Config
from nuciseg.distributed import checks
from nuciseg.distributed.all_reduce import NUM_BYTES, AllReduce
from nuciseg.distributed.checks import Check
from nuciseg.distributed.examination import _disk
from nuciseg.distributed.node_facts import Images, NodeFacts
from nuciseg.distributed.nodes import Result, describe_task_error, node_names
from nuciseg.errors import DataError

VERSIONS = {"Python": "3.11.9", "Ray": "2.60.0", "torch": "2.13.0", "nuciseg": "0.1.0 (1a2b3c4d)"}
CPU = NodeFacts(versions=VERSIONS, gpus=(), precision="bf16", full={"/tmp": 0.5}, cache_free_bytes=10**9)
GPU = replace(CPU, gpus=("A10G", "A10G"))


def passes(check: Check, *words: str) -> None:
    assert check.passed, check.said
    assert all(word in check.said for word in words), check.said


def fails(check: Check, *words: str) -> None:
    assert not check.passed, check.said
    assert all(word in check.said for word in words), check.said


def test_a_node_that_does_not_answer_is_named() -> None:
    passes(checks.check_nodes({"a": Result(CPU), "b": Result(CPU)}), "2 nodes: a, b")
    fails(
        checks.check_nodes({"a": Result(CPU), "b": Result(failure="is silent; wake it")}), "node b is silent; wake it"
    )


def test_versions_are_those_of_this_process() -> None:
    passes(checks.check_versions({"a": CPU, "b": CPU}, VERSIONS), "Python 3.11.9, Ray 2.60.0, torch 2.13.0")
    other = replace(CPU, versions={**VERSIONS, "torch": "2.12.1"})
    fails(checks.check_versions({"a": CPU, "b": other}, VERSIONS), "torch is 2.13.0", "2.12.1 on node b", "one image")


def test_gpus_of_ray_are_gpus_of_torch() -> None:
    passes(checks.check_gpus({"a": CPU}, {"a": 0}), "none: workers train on CPUs")
    passes(checks.check_gpus({"a": CPU}, {"a": 0}, 4), "none yet, up to 4 come with the work")
    passes(checks.check_gpus({"a": CPU, "b": GPU}, {"a": 0, "b": 2}), "2 x A10G")
    passes(checks.check_gpus({"a": GPU}, {"a": 1}), "2 x A10G; Ray leaves 1 of them idle")
    fails(checks.check_gpus({"a": CPU}, {"a": 4}), "Ray offers 4 GPUs on node a but torch sees 0", "NVIDIA's driver")


def test_all_workers_compute_in_one_type() -> None:
    passes(checks.check_precision({"a": CPU}, "auto", None), "native", "auto takes bf16")
    old = replace(CPU, precision="fp32")
    passes(checks.check_precision({"a": old}, "auto", None), "not native here", "auto takes fp32")
    passes(checks.check_precision({"a": old, "b": GPU}, "auto", None), "auto takes bf16")  # the head trains nothing
    fails(checks.check_precision({"a": old, "b": CPU}, "auto", None), "fp32 on node a, bf16 on node b")
    fails(checks.check_precision({"a": old, "b": GPU}, "bf16", False), "node a does not compute natively")


def test_a_sum_of_gradients_is_told_as_the_time_of_a_step() -> None:
    check = checks.check_all_reduce(AllReduce("gloo", 4, 0.1), NUM_BYTES // 10)
    passes(check, "gloo over 4 workers: 0.50 GB/s", "3.4 MB of gradients", "10.0 ms a step")


def test_every_node_reads_the_same_images() -> None:
    passes(checks.check_images({"a": Result(Images(12, "x")), "b": Result(Images(12, "x"))}), "12 training images")
    fails(checks.check_images({"a": Result(Images(12, "x")), "b": Result(Images(9, "y"))}), "12 on node a, 9 on node b")
    fails(checks.check_images({"a": Result(Images(12, "x")), "b": Result(failure="no such folder")}), "node b: no such")


@pytest.mark.parametrize(
    ("state", "said"),
    [("none", "not used"), ("offline", "wandb sync"), ("online", "reachable, with a key, from 1 node")],
)
def test_wandb_is_as_it_is_meant(state: str, said: str) -> None:
    passes(checks.check_wandb({"a": Result(state)}), said)


def test_wandb_on_some_nodes_alone_is_wrong() -> None:
    fails(checks.check_wandb({"a": Result("online"), "b": Result("offline")}), "node b has no W&B key", "~/.netrc")
    fails(checks.check_wandb({"a": Result("https://w")}), "https://w does not answer from node a", "tracking.kind")
    fails(checks.check_wandb({"a": Result(failure="tracking.kind is 'wandb' but")}), "node a: tracking.kind is 'wandb'")


def test_clocks_agree_within_two_seconds() -> None:
    passes(checks.check_clocks({"a": Result(0.01), "b": Result(-1.5)}), "at most 1.50 s")
    fails(checks.check_clocks({"a": Result(0.01), "b": Result(-3600.0)}), "node b is 3600 s behind", "chrony")


def test_checkpoints_fit_and_no_disk_is_full() -> None:
    passes(checks.check_disk({"a": CPU}, 10**6, 10**9, "runs", "go"), "up to 1 MB of 1000 MB free in runs")
    fails(checks.check_disk({"a": CPU}, 10**9, 10**6, "runs", "go"), "up to 1000 MB but runs has 1 MB free", "or go")
    full = replace(CPU, full={"/tmp": 0.97})
    fails(checks.check_disk({"a": full}, 1, 10**9, "runs", "go"), "the disk of /tmp on node a is 97% full", "95%")


def test_of_runs_in_a_bucket_each_node_has_copies() -> None:
    config = Config().replaced({"run.storage_path": "s3://bucket/runs"})
    assert _disk(config, {"a": CPU}).passed
    fails(_disk(config, {"a": CPU, "b": replace(CPU, cache_free_bytes=10**6)}), "the cache of node b has 1 MB free")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("no images there; look"), "no images there; look"),
        (
            RuntimeError("failed to import on the worker\n\nNo module named 'nuciseg.distributed'"),
            "cannot import nuciseg",
        ),
        (ImportError("libcudnn.so: not found"), "cannot import what nuciseg needs (libcudnn.so: not found)"),
        (ZeroDivisionError("division by zero"), "failed with ZeroDivisionError (division by zero)"),
    ],
)
def test_what_a_function_raises_on_a_node_becomes_a_sentence(error: BaseException, said: str) -> None:
    assert said in describe_task_error(error)


def test_nodes_of_one_host_are_told_apart() -> None:
    host = {"NodeManagerHostname": "box", "NodeManagerAddress": "10.0.0.1"}
    alone = [{"NodeID": "aaaaaaaaaa", **host}]
    assert node_names(alone) == {"aaaaaaaaaa": "box (10.0.0.1)"}
    twins = [*alone, {"NodeID": "bbbbbbbbbb", **host}]
    assert node_names(twins) == {"aaaaaaaaaa": "box (10.0.0.1) aaaaaaaa", "bbbbbbbbbb": "box (10.0.0.1) bbbbbbbb"}
