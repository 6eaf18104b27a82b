"""Ray as `nuciseg` starts it: these are read when it starts."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
