"""Runs beside `ray start` on AWS machines and tells Ray when AWS takes this one back, two minutes before it does.

cluster.yaml starts it by `python -m nuciseg.distributed.spot_notice`. AWS says so by the machine's own metadata service
(https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html).
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path

METADATA_URL = "http://169.254.169.254/latest"
ASK_EVERY_S = 5.0  # as AWS recommends
TIMEOUT_S = 2.0
MARGIN_S = 5
LOCK_FILE = "nuciseg-spot-notice.lock"

# The service is this machine's own: no proxy leads there.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def seconds_left() -> float | None:
    """Until AWS takes this machine back; None as long as it has not said that it will, or does not answer."""
    ask_token = urllib.request.Request(
        f"{METADATA_URL}/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    try:
        with _open(ask_token, timeout=TIMEOUT_S) as answer:
            token = answer.read().decode()
        ask = urllib.request.Request(
            f"{METADATA_URL}/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
        )
        with _open(ask, timeout=TIMEOUT_S) as answer:
            at = datetime.strptime(json.loads(answer.read())["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    # 404 as long as there is no notice, or a broken answer
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return None
    return (at - datetime.now(UTC)).total_seconds()


def drain(left_s: float) -> bool:
    """Tell Ray that this node goes in `left_s` seconds. Whether Ray took it."""
    deadline_s = max(1, round(left_s) - MARGIN_S)
    command = ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", str(deadline_s)]
    return subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command]).returncode == 0


def main() -> None:
    """Ask until AWS has said it and Ray has heard it; a second one on the same machine ends at once."""
    lock = (Path(tempfile.gettempdir()) / LOCK_FILE).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    while True:
        left_s = seconds_left()
        if left_s is not None and drain(left_s):
            return
        time.sleep(ASK_EVERY_S)


if __name__ == "__main__":
    main()
