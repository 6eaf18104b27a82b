"""The view in Weights & Biases: built by the real library, saved to a server on this machine that keeps it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from written_runs import search_config, split, write_run, write_search

pytest.importorskip("wandb_workspaces", reason="not installed: pip install -e '.[dashboard]'")

DASHBOARD = Path(__file__).resolve().parents[2] / "tune_configs" / "dashboard.py"
FAKE_KEY = "0123456789abcdef0123456789abcdef01234567"
MODELS = [{"kind": "unet", "depth": 2}, {"kind": "unet", "depth": 3}]
SPACE = {
    "optim.lr": {"loguniform": [1e-4, 1e-1]},
    "loss.weights.dice": {"uniform": [0, 2]},
    "model": {"choice": MODELS},
}


class Server(ThreadingHTTPServer):
    """Answers as W&B does, as far as these views ask. `views` are the variables of what was to be saved."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.views: list[dict[str, Any]] = []
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        given = asked.get("variables") or {}
        saves = "upsertView" in asked["query"]
        if saves:
            self.server.views.append(given)
        view = {
            "id": f"view{len(self.server.views)}",
            "type": "runs",
            "description": "",
            "project": {"id": "p", "name": given.get("projectName"), "entityName": given.get("entityName")},
            **{key: given.get(key) for key in ("name", "displayName", "spec")},
        }
        page = {"endCursor": None, "hasNextPage": False}
        project = {"id": "p", "name": "nuciseg", "entityName": "team", "internalId": "cDE="}
        data = {
            "viewer": {"id": "u", "entity": "team", "username": "someone", "flags": "{}", "teams": {"edges": []}},
            "project": project,
            "models": {"edges": [], "pageInfo": page},
            "result": {"project": project, "model": project, "inserted": True},
            "upsertView": {"view": view, "inserted": True},
        }
        refusal = {"errors": [{"message": "permission denied"}], "data": None}
        body = json.dumps(refusal if saves and self.server.refuses else {"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def search(tmp_path: Path) -> Path:
    trials = [({"optim.lr": 1e-3, "loss.weights.dice": 1.0, "model": MODELS[0]}, [3, 5])]
    return write_search(tmp_path / "search", search_config(SPACE), trials)


def dashboard(home: Path, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, str(DASHBOARD), *map(str, words)],
        env=clean | {"HOME": str(home)} | environment, cwd=home, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def panels(spec: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The configurations of all panels of a kind, wherever they lie in a view."""
    found = [spec["config"]] if spec.get("viewType") == kind else []
    for value in spec.values():
        for inner in value if isinstance(value, list) else [value]:
            found += panels(inner, kind) if isinstance(inner, dict) else []
    return found


def test_both_views_are_saved_with_all_that_the_page_shows(server: Server, search: Path, tmp_path: Path) -> None:
    result = dashboard(tmp_path, search, WANDB_BASE_URL=server.url, WANDB_API_KEY=FAKE_KEY)
    assert result.returncode == 0, result.stderr
    assert f"workspace: {server.url}/team/nuciseg?nw=" in result.stdout
    assert f"report: {server.url}/team/nuciseg/reports/" in result.stdout
    workspace, report = server.views
    assert (workspace["type"], report["type"]) == ("project-view", "runs")
    for view in (workspace, report):
        assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "nuciseg", "nuciseg: search")
        spec = json.loads(view["spec"])
        curves = {plot["metrics"][0]: plot["xAxis"] for plot in panels(spec, "Run History Line Plot")}
        assert curves == dict.fromkeys(("cluster_score", "train_loss", "ap_mean_per_image", "border_dice"), "epoch")
        [parallel] = panels(spec, "Parallel Coordinates Plot")
        assert [(column["accessor"], column.get("log")) for column in parallel["columns"]] == [
            ("config:optim.value.lr", True),
            ("config:loss.value.weights.dice", False),
            ("config:model.value.depth", False),
            ("summary:best_cluster_score", None),
        ]
        [importance] = panels(spec, "Parameter Importance")
        assert importance["targetKey"] == "best_cluster_score"
        [pictures] = panels(spec, "Media Browser")
        assert pictures["mediaKeys"] == [f"overlays/{id}" for id in split().validation_ids]
        assert '"value": ["search"]' in json.dumps(spec), "only this search's runs"
    assert '"failed"' in report["spec"]


def test_a_run_is_shown_with_those_of_its_group(server: Server, search: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3, 5])
    result = dashboard(tmp_path, search, run, "--entity", "us", WANDB_BASE_URL=server.url, WANDB_API_KEY=FAKE_KEY)
    assert result.returncode == 0, result.stderr
    assert {view["entityName"] for view in server.views} == {"us"}
    assert all('"value":["search","run"]' in view["spec"].replace(" ", "") for view in server.views)


def refused(result: subprocess.CompletedProcess[str], words: str) -> bool:
    return result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1


def test_without_a_key_it_says_so(search: Path, tmp_path: Path) -> None:
    assert refused(dashboard(tmp_path, search), "has no key here: run `wandb login`")


def test_offline_it_says_so(search: Path, tmp_path: Path) -> None:
    result = dashboard(tmp_path, search, WANDB_MODE="offline", WANDB_API_KEY=FAKE_KEY)
    assert refused(result, "W&B is offline")


def test_without_a_server_it_says_so(search: Path, tmp_path: Path) -> None:
    result = dashboard(tmp_path, search, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=FAKE_KEY)
    assert refused(result, "W&B at http://127.0.0.1:9 does not answer")


def test_a_view_that_is_refused_is_told(server: Server, search: Path, tmp_path: Path) -> None:
    server.refuses = True
    result = dashboard(tmp_path, search, WANDB_BASE_URL=server.url, WANDB_API_KEY=FAKE_KEY)
    assert refused(result, "W&B did not take the workspace: "), result.stderr
    assert "permission denied" in result.stderr


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    assert refused(dashboard(tmp_path, tmp_path), "holds no run and no search")
