"""Whether all nodes of the cluster see the same files.

Each node that is asked imports this module, so it imports little.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import ray

from nuciseg.buckets import BucketFolder
from nuciseg.distributed.nodes import Result, alive_nodes, on_every_node
from nuciseg.errors import ResourceError, StorageAwayError, writing
from nuciseg.patience import is_away, patiently

STORAGE_SETTING = "run.storage_path"
SEEN_TIMEOUT_S = 60.0  # by default NFS takes up to a minute to look again for what it did not find
LOOK_S = 0.5
PUT_IT_THERE = "put it on storage that all nodes share, or on every node by file_mounts in the cluster file"


def require_shared(folder: Path | str, setting: str = STORAGE_SETTING) -> None:
    """Write a file into `folder` here, read it on every node and write one there; the folder is made where it lacks.

    Without Ray or on one node nothing is done, but a bucket is asked by this machine. Raises ResourceError, which
    names `setting`, where a node sees another folder or may not write; a folder that was made for the probe is gone
    then.
    """
    if isinstance(folder, str):
        _require_bucket(folder, setting)
        return
    if not _several_nodes():
        return
    folder = folder.resolve()
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        _refuse(f"{setting} is {folder}", _probe(folder, alive_nodes()), _share_it(setting))
    except ResourceError:
        for each in made:
            with contextlib.suppress(OSError):  # somebody else has begun to use it
                each.rmdir()
        raise


def _require_bucket(uri: str, setting: str) -> None:
    token = uuid4().hex
    probe = f".probe-{token}"
    bucket = BucketFolder(uri)
    bucket.write(probe, token.encode())
    try:
        bucket.read(probe)
        if _several_nodes():
            cure = "give each node the rights and the environment (AWS_ENDPOINT_URL, if it is set) that this one has"
            answers = on_every_node(_what_is_wrong_in_bucket, uri, probe)
            _refuse(f"{setting} is {uri}", answers, cure)
    finally:
        bucket.delete(probe)


def require_everywhere(paths: Mapping[str, Path]) -> None:
    """Raise ResourceError for the first of `paths`, by the setting that names it, that a node of several lacks."""
    if not _several_nodes():
        return
    for setting, path in paths.items():
        path = path.resolve()
        _refuse(f"{setting} is {path}", on_every_node(_what_is_missing, path), PUT_IT_THERE)


def require_shared_by_joined(folder: Path | None, files: Mapping[str, Path], known: set[str]) -> None:
    """Ask the nodes that joined, those whose ids are not among `known`, whether they work in `folder` (None: there is
    none) and have `files`, by the settings that name them; those that do are added to `known`.

    A node that does not answer is asked again the next time: it may be starting, or gone. So are all where the storage
    is away. Raises ResourceError where one answers that it sees another folder, may not write, or lacks a file.
    """
    joined: Mapping[str, str] = {id: name for id, name in alive_nodes().items() if id not in known}
    if not joined:
        return
    if folder is not None:
        try:
            answers = _probe(folder, joined)
        except ResourceError as error:
            if error.__cause__ is not None and is_away(error.__cause__):
                return
            raise
        joined = _judged(answers, joined, f"the search lies in {folder}", _share_it(STORAGE_SETTING))
    for setting, path in files.items():
        path = path.resolve()
        answers = on_every_node(_what_is_missing, path, among=joined)
        joined = _judged(answers, joined, f"{setting} is {path}", PUT_IT_THERE)
    known.update(joined)


def _judged(
    answers: Mapping[str, Result[str | None]], nodes: Mapping[str, str], what: str, cure: str
) -> Mapping[str, str]:
    """Those of `nodes` that answered, well; raises ResourceError where one did not answer well."""
    answered = {name: answer for name, answer in answers.items() if answer.failure is None}
    _refuse(what, answered, cure)
    return {node_id: name for node_id, name in nodes.items() if name in answered}


def await_seen(path: Path) -> None:
    """Wait until `path`, which another machine has written, is seen by this one: a network's folder may show it late.

    Raises StorageAwayError, which names this machine, where it is not seen within a minute, or is away for two.
    """
    until_s = time.monotonic() + SEEN_TIMEOUT_S
    while not _exists(path):
        if time.monotonic() > until_s:
            raise StorageAwayError(
                f"node {socket.gethostname()} does not see {path}; mount there what the other nodes share, or "
                f"set {STORAGE_SETTING} to a folder that all nodes share"
            )
        time.sleep(LOOK_S)


def _exists(path: Path) -> bool:
    try:
        return patiently(path.exists)
    except OSError as error:
        raise StorageAwayError(
            f"node {socket.gethostname()} cannot look for {path} ({error.strerror}); see that its mount answers there"
        ) from error


def _probe(folder: Path, nodes: Mapping[str, str]) -> dict[str, Result[str | None]]:
    """What each of `nodes` says of a file that is written into `folder` here; the folder is made where it lacks."""
    token = uuid4().hex
    probe = folder / f".probe-{token}"
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text(token, encoding="ascii")
        return on_every_node(_what_is_wrong, probe, token, among=nodes)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _share_it(setting: str) -> str:
    return f"set {setting} to a folder that all nodes share, such as an NFS or EFS mount"


def _several_nodes() -> bool:
    return ray.is_initialized() and len(alive_nodes()) > 1


def _what_is_wrong(probe: Path, token: str) -> str | None:
    """On a node: why it and the writer of the probe do not work in the same folder; None where they do."""
    try:
        if probe.read_text(encoding="ascii") != token:
            return "reads something else there"
    except OSError as error:
        if is_away(error):
            raise StorageAwayError(f"gets no answer there ({error.strerror})") from error
        return "does not see what is written there"
    own = probe.with_name(f"{probe.name}-{uuid4().hex}")
    try:
        own.touch()
        own.unlink()
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return None


def _what_is_wrong_in_bucket(uri: str, probe: str) -> str | None:
    """On a node: why it cannot work in the bucket; None where it can."""
    try:
        bucket = BucketFolder(uri)
        own = f"{probe}-{uuid4().hex}"
        bucket.write(own, bucket.read(probe))
        bucket.delete(own)
    except ResourceError as error:
        return f"cannot use it ({error})"
    return None


def _what_is_missing(path: Path) -> str | None:
    return None if path.exists() else "has no such path"


def _refuse(what: str, answers: Mapping[str, Result[str | None]], cure: str) -> None:
    reasons = {name: answer.failure or answer.value for name, answer in answers.items()}
    wrong = [f"{name} {reason}" for name, reason in reasons.items() if reason is not None]
    if wrong:
        more = f" (and {len(wrong) - 1} of {len(answers)} nodes more)" if len(wrong) > 1 else ""
        raise ResourceError(f"{what}, but node {wrong[0]}{more}; {cure}")
