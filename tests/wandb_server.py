"""A stand-in for W&B's server, which no machine can install: it keeps what wandb's own client sends.

It answers the few GraphQL operations by which a client starts a run, goes on with one, uploads files and keeps
artifacts (https://github.com/wandb/wandb, core/internal), and takes rows at the places that the client gives them, as
the real one does.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from wandb_offline import is_media

ENTITY = "lab"
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class ReceivedRun:
    """What came of one run; `lines` are by file and place, `files` by path."""

    fields: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    def rows(self) -> list[dict[str, Any]]:
        """The history by steps: `wandb sync` sends rows again that were here, with the step that they had."""
        by_step: dict[int, dict[str, Any]] = {}
        for _, line in sorted(self.lines.get(HISTORY, {}).items()):
            row = json.loads(line)
            assert by_step.setdefault(row["_step"], row) == row, "two rows of one step"
        return [row for _, row in sorted(by_step.items())]

    def epochs(self) -> list[int]:
        """Epochs of the rows that hold metrics rather than pictures or tables."""
        return [row["epoch"] for row in self.rows() if "epoch" in row and not any(map(is_media, row.values()))]


class WandbServer:
    """Serves at `address`, also again after `stop`; what it has received stays."""

    def __init__(self) -> None:
        self.runs: dict[str, ReceivedRun] = {}
        self.artifacts: dict[str, dict[str, bytes]] = {}  # files by name, by artifact
        self.committed: set[str] = set()
        self.unknown: list[str] = []
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._port = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections and cut those that are open."""
        if self._server is not None:
            self._server.cut()
            self._server = None

    def run(self, id: str) -> ReceivedRun:
        return self.runs.setdefault(id, ReceivedRun())

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        with self._lock:
            if path == "/graphql":
                return {"data": self._operation(**json.loads(body))}
            _, _files, _entity, _project, id, _file_stream = path.split("/")
            self._take(self.run(id), json.loads(body))
            return {}

    def keep(self, path: str, body: bytes) -> None:
        """A file that was put at the address given for it."""
        _, kind, owner, name = path.split("/", 3)
        with self._lock:
            if kind == "run-file":
                self.run(owner).files[unquote(name)] = body
            else:
                self.artifacts.setdefault(owner, {})[unquote(name)] = body

    @staticmethod
    def _take(run: ReceivedRun, message: dict[str, Any]) -> None:
        for name, chunk in message.get("files", {}).items():
            for place, line in enumerate(chunk["content"], start=chunk["offset"]):
                run.lines.setdefault(name, {})[place] = line
        if message.get("complete"):
            run.exit_code = message["exitcode"]

    def _operation(self, query: str, variables: dict[str, Any] | None = None, **_other: Any) -> dict[str, Any]:
        name = query.split("(")[0].split("{")[0].split()[1]
        variables = variables or {}
        match name:
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "Viewer":
                user = {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
                return {"viewer": user}
            case "RunResumeStatus":
                project = {"id": "1", "name": variables["project"], "entity": _entity()}
                return {"model": {**project, **self._bucket(variables)}}
            case "UpsertBucket":
                return {"upsertBucket": self._upserted(variables)}
            case "CreateRunFiles":
                run = variables["run"]
                files = [{"name": name, "uploadUrl": self._url("run-file", run, name)} for name in variables["files"]]
                return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                id = f"{variables['input']['artifactCollectionName']}-{variables['input']['digest']}"
                state = "COMMITTED" if id in self.committed else "PENDING"
                artifact = {"id": id, "state": state, "artifactSequence": {"id": "1", "latestArtifact": None}}
                return {"createArtifact": {"artifact": artifact}}
            case "CreateArtifactManifest":
                return {"createArtifactManifest": {"artifactManifest": self._manifest(variables["artifactID"])}}
            case "UpdateArtifactManifest":
                return {"updateArtifactManifest": {"artifactManifest": self._manifest(variables["artifactManifestID"])}}
            case "CreateArtifactFiles":
                nodes = [{"node": self._place(file)} for file in variables["input"]["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": nodes}}}
            case "CommitArtifact":
                self.committed.add(variables["artifactID"])
                return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": ""}}}
        self.unknown.append(query)
        return {}

    def _url(self, kind: str, owner: str, name: str) -> str:
        """Where a file is to be put; `keep` takes it apart."""
        return f"{self.address}/{kind}/{owner}/{name}"

    def _manifest(self, artifact: str) -> dict[str, Any]:
        url = self._url("artifact", artifact, "manifest")
        return {"id": artifact, "file": {"id": "1", "uploadUrl": url, "uploadHeaders": []}}

    def _place(self, file: dict[str, Any]) -> dict[str, Any]:
        owner, name = file["artifactID"], file["name"]
        return {
            "storagePath": f"{owner}/{name}",
            "uploadUrl": self._url("artifact", owner, name),
            "uploadHeaders": [],
            "uploadMultipartUrls": None,
            "artifact": {"id": owner},
        }

    def _bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"bucket": None}
        history = run.lines.get(HISTORY, {})
        last = history[max(history)] if history else ""
        summaries = run.lines.get(SUMMARY, {})
        bucket = {
            **self._facts(variables["name"]),
            "summaryMetrics": summaries[max(summaries)] if summaries else "{}",
            "historyTail": json.dumps([last] if last else []),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": run.fields.get("tags") or [],
            "notes": None,
            "wandbConfig": '{"t": {}}',
        }
        return {"bucket": bucket}

    def _upserted(self, variables: dict[str, Any]) -> dict[str, Any]:
        id = variables["name"]
        known = id in self.runs
        run = self.run(id)
        run.fields.update({key: value for key, value in variables.items() if value is not None})
        project = {"id": "1", "name": run.fields["project"], "entity": _entity()}
        bucket = {**self._facts(id), "description": None, "sweepName": None, "project": project}
        return {"bucket": bucket, "inserted": not known}

    def _facts(self, id: str) -> dict[str, Any]:
        """What every answer about a run says of it."""
        run = self.runs[id]
        return {
            "id": id,
            "name": id,
            "displayName": run.fields.get("displayName"),
            "config": run.fields.get("config") or "{}",
            "historyLineCount": len(run.lines.get(HISTORY, {})),
        }


@contextmanager
def serving_wandb() -> Iterator[WandbServer]:
    """A server that runs while the block does, unless the block stops it."""
    server = WandbServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *arguments: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was cut is no news."""

    def cut(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_arguments: Any) -> None:
            """Nothing: the tests look at what was received."""

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_HEAD(self) -> None:
            self._send(b"")

        def do_POST(self) -> None:
            self._send(json.dumps(server.answer(self.path, self._body())).encode())

        def do_PUT(self) -> None:
            server.keep(self.path, self._body())
            self._send(b"")

    return Handler


def _entity() -> dict[str, str]:
    return {"id": "1", "name": ENTITY}
