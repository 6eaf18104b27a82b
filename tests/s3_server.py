"""A real S3 server on loopback, and what tests do with it."""

from __future__ import annotations

import logging
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import pytest
from moto.server import ThreadedMotoServer

from nuciseg import buckets


@contextmanager
def serving_s3(port: int = 0) -> Iterator[str]:
    """The address of a server that runs while the block does, with the buckets of earlier ones of this process."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def use_server(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment as a user of that server has it; child processes inherit it."""
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",  # else the machine is asked for its role
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    buckets._s3.cache_clear()


def make_bucket(address: str) -> str:
    """The name of a new bucket."""
    name = f"bucket-{uuid4().hex[:12]}"
    _send("PUT", f"{address}/{name}", b"")
    return name


def demand_permission(address: str, demanded: bool) -> None:
    """Whether the server refuses who has no key that it knows."""
    after = b"0" if demanded else b"inf"
    _send("POST", f"{address}/moto-api/reset-auth", after)


def upload_folder(folder: Path, uri: str) -> None:
    """Every file below `folder`, under its own name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            put(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def put(uri: str, data: bytes) -> None:
    """Store an object in one request, as most tools do with small files; pyarrow needs three."""
    address = f"{os.environ['AWS_ENDPOINT_URL']}/{quote(uri.removeprefix('s3://'))}"
    _send("PUT", address, data)


def _send(method: str, address: str, data: bytes) -> None:
    headers = {"Content-Type": "application/octet-stream"}  # else the server reads a form
    urllib.request.urlopen(urllib.request.Request(address, data=data, headers=headers, method=method)).close()
