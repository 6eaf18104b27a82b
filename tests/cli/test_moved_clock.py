"""The clock is moved by an hour, forwards and backwards, while a run trains."""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_runs import QUICK_TO_LEARN, assert_same_run, last_checkpoint, logged_epochs, run, wait_until
from wandb_offline import assert_one_wandb_run

from nuciseg.config import load_config, merged

COMPILER = shutil.which("cc")
NUM_EPOCHS = 8
HOUR_S = 3600

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs Linux and a C compiler"),
]

# The system's clock cannot be moved for one process alone: these stand before the C library's own functions.
MOVED_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static int (*ask)(clockid_t, struct timespec *);
static volatile long long *moved_s;

__attribute__((constructor)) static void begin(void) {
    ask = dlsym(RTLD_NEXT, "clock_gettime");
    int file = open(getenv("MOVED_CLOCK"), O_RDONLY);
    moved_s = mmap(NULL, sizeof *moved_s, PROT_READ, MAP_SHARED, file, 0);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!ask) begin();
    int failed = ask(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *moved_s;
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    now->tv_sec = at.tv_sec;
    now->tv_usec = at.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (now) *now = at.tv_sec;
    return at.tv_sec;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clock") / "moved_clock.so"
    path.with_suffix(".c").write_text(MOVED_CLOCK)
    command = [str(COMPILER), "-shared", "-fPIC", "-O2", "-o", path, path.with_suffix(".c"), "-ldl"]
    subprocess.run(command, check=True)
    return path


def move(clock: Path, seconds: int) -> None:
    with clock.open("r+b") as file:
        file.write(struct.pack("q", seconds))


def test_the_clock_of_the_library_is_moved(library: Path, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_bytes(bytes(8))
    code = "import os, struct, time; real = time.time(); open(os.environ['MOVED_CLOCK'], 'r+b').write("
    code += f"struct.pack('q', {HOUR_S})); print(round(time.time() - real))"
    moved = {"LD_PRELOAD": str(library), "MOVED_CLOCK": str(clock)}
    said = subprocess.run([sys.executable, "-c", code], env={**os.environ, **moved}, capture_output=True, text=True)
    assert said.stdout == f"{HOUR_S}\n", said.stderr


def test_a_run_does_not_care_for_the_clock(library: Path, tmp_path: Path) -> None:
    more = {
        "data": {"synthetic": {"num_train": 150}},
        "train": {"epochs": NUM_EPOCHS},
        "tracking": {"kind": "offline"},
        "run": {"storage_path": "runs", "name": "moved"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(merged(QUICK_TO_LEARN, more)))
    clock, run_dir, log = tmp_path / "clock", tmp_path / "runs" / "moved", tmp_path / "train.log"
    clock.write_bytes(bytes(8))
    moved = {"LD_PRELOAD": str(library), "MOVED_CLOCK": str(clock)}
    with log.open("w") as output:
        command = [sys.executable, "-m", "nuciseg.train", "--config", "run.yaml"]
        environment = {**os.environ, **moved}
        training = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: logged_epochs(run_dir) != [] or training.poll() is not None, "an epoch")
        hours = itertools.cycle((1, 0, -1, 0))  # within whatever the run times
        while training.poll() is None:
            move(clock, HOUR_S * next(hours))
            time.sleep(0.1)
        assert training.returncode == 0, log.read_text()
    finally:
        training.kill()
    assert "Traceback" not in log.read_text()
    assert logged_epochs(run_dir) == list(range(1, NUM_EPOCHS + 1))
    assert_one_wandb_run(run_dir)
    for row in last_checkpoint(run_dir).progress.history:
        assert 0 <= row["train_s"] < 600
        assert 0 <= row["validation_s"] < 600
    run(load_config(tmp_path / "run.yaml"), tmp_path / "undisturbed")
    assert_same_run(run_dir, tmp_path / "undisturbed")
