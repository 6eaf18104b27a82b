"""One function, once on every node of the connected cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nuciseg.errors import NucisegError

ANSWER_TIMEOUT_S = 60.0  # a node starts a Python process for the question and imports torch, slowly where trials run

T = TypeVar("T")


@dataclass(frozen=True)
class Result(Generic[T]):
    """What one node answered: a `value`, or in `failure` the sentence that says why there is none."""

    value: T | None = None
    failure: str | None = None


def node_must_go() -> bool:
    """Whether the node of this process, a worker of Ray's, has to go, as far as Ray was told."""
    from ray._private.state import state  # where Ray Train asks for its own workers

    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()


def on_every_node(
    function: Callable[..., T],
    *arguments: Any,
    among: Mapping[str, str] | None = None,
    timeout_s: float = ANSWER_TIMEOUT_S,
    in_own_process: bool = False,
) -> dict[str, Result[T]]:
    """What `function(*arguments)` gives on each alive node, by the node's name; all are asked at the same time.

    `among`, names by id as `alive_nodes` gives them, asks those nodes alone.

    It waits behind no trial, because it asks for no CPU. `in_own_process` is for a function that leaves something in
    its process: that ends with the call, else Ray keeps it for what is asked next. Nothing that happens on a node is
    raised here: neither an error of `function` nor a node that stalls or lacks nuciseg. One that died meanwhile is left
    out. Ray must be connected.
    """
    remote = ray.remote(num_cpus=0, max_retries=0, max_calls=1 if in_own_process else 0)(function)
    names = alive_nodes() if among is None else among
    asked = {remote.options(scheduling_strategy=on_node(node_id)).remote(*arguments): node_id for node_id in names}
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    results: dict[str, Result[T]] = {asked[reference]: _answer(reference) for reference in answered}
    for reference in silent:
        ray.cancel(reference, force=True)
        results[asked[reference]] = Result(
            failure=f"does not answer within {timeout_s:g} s; look whether the machine is overloaded or out of reach"
        )
    still_there = alive_nodes()
    return {
        name: results[node_id]
        for node_id, name in names.items()
        if node_id in still_there or results[node_id].failure is None
    }


@contextmanager
def stationed(actor_class: type, timeout_s: float = ANSWER_TIMEOUT_S) -> Iterator[dict[str, Any]]:
    """An actor on each alive node where one starts within `timeout_s`, by the node's name; they end with the block."""
    remote = ray.remote(num_cpus=0)(actor_class)
    names = alive_nodes()
    actors = {name: remote.options(scheduling_strategy=on_node(id)).remote() for id, name in names.items()}
    try:
        waiting = {actor.__ray_ready__.remote(): name for name, actor in actors.items()}
        started, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
        yield {waiting[reference]: actors[waiting[reference]] for reference in started}
    finally:
        for actor in actors.values():
            ray.kill(actor)


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Where a task or actor has to run, and nowhere else."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def alive_nodes() -> dict[str, str]:
    """The names of the alive nodes by their ids, head node first."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    nodes.sort(key=lambda node: ("node:__internal_head__" not in node["Resources"], node["NodeManagerAddress"]))
    return node_names(nodes)


def node_names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Host name and address by node id; nodes that have both in common are told apart by their id."""
    names = {node["NodeID"]: _host(node) for node in nodes}
    seen = Counter(names.values())
    return {id: f"{name} {id[:8]}" if seen[name] > 1 else name for id, name in names.items()}


def _host(node: Mapping[str, Any]) -> str:
    host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
    return str(address) if host == address else f"{host} ({address})"


def _answer(reference: ray.ObjectRef[T]) -> Result[T]:
    try:
        return Result(value=ray.get(reference))
    except RayTaskError as error:
        return Result(failure=describe_task_error(error.cause or error))
    except RayError as error:
        return Result(
            failure=f"could not be asked ({_first_line(error)}); see `ray status`, and add a node in its place"
        )


def describe_task_error(error: BaseException) -> str:
    """One sentence for what a function raised on a node."""
    if isinstance(error, NucisegError):
        return str(error)
    if "No module named 'nuciseg" in str(error):
        return (
            "cannot import nuciseg; install it there in the same version, by the image or the setup_commands of the "
            "cluster file"
        )
    if isinstance(error, ImportError) or "failed to import on the worker" in str(error):
        return f"cannot import what nuciseg needs ({_last_line(error)}); install nuciseg there as on the other nodes"
    return f"failed with {type(error).__name__} ({_last_line(error)})"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
