"""AWS's metadata service of one machine, as far as a spot machine is told there that it has to go.

python metadata_service.py SECONDS   on a host: at the service's own address, with a notice of SECONDS
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-token"


class Service(ThreadingHTTPServer):
    """`notice_s`: how many seconds this machine has left; None while AWS has said nothing."""

    notice_s: float | None = None


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        asked = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self._answer(200 if asked else 400, TOKEN if asked else "")

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            self._answer(401, "")
        elif self.path != "/latest/meta-data/spot/instance-action" or self.server.notice_s is None:
            self._answer(404, "")
        else:
            at = datetime.now(UTC) + timedelta(seconds=self.server.notice_s)
            self._answer(200, json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serving_metadata() -> Iterator[Service]:
    """A service on loopback."""
    service = Service(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield service
    service.shutdown()
    service.server_close()


if __name__ == "__main__":
    subprocess.run(["ip", "address", "add", "169.254.169.254/32", "dev", "lo"], check=True)
    service = Service(("169.254.169.254", 80), Handler)
    service.notice_s = float(sys.argv[1])
    service.serve_forever()
