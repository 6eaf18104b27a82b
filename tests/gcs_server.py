"""A server on loopback that answers as Google's object storage does, and what tests do with it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
from gcp_storage_emulator.server import create_server

from nuciseg import buckets


@contextmanager
def serving_gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a new bucket; the environment is that of a user of the server, and child processes inherit it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = f"bucket-{uuid4().hex[:12]}"
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=name)
    server.start()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{port}")
    buckets._gcs.cache_clear()
    try:
        yield f"gs://{name}"
    finally:
        server.stop()
        buckets._gcs.cache_clear()
