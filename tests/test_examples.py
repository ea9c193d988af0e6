"""The examples run from the command line, in small, and write what they say."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"
RUNS = {
    "mask_gallery": ([], "panels", ["mask_gallery.png"]),
    "mnist_uncertainty": (
        ["--epochs", "1", "--samples", "5", "--hidden", "16"],
        "calibration error after",
        ["mnist_uncertainty.json", "mnist_uncertainty.png"],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name, tmp_path):
    options, said, files = RUNS[name]
    quiet = [] if name == "mask_gallery" else ["--quiet"]
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(tmp_path), *options, *quiet]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert said in run.stdout
    assert all((tmp_path / file).stat().st_size > 500 for file in files)


def test_a_set_that_is_not_there_is_said(tmp_path):
    command = [sys.executable, str(EXAMPLES / "uci_regression.py"), "--data", str(tmp_path), "--set", "nothing"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2
    assert "no set at" in run.stderr


def test_a_killed_regression_goes_on_where_it_was(tmp_path):
    """Killed after its first checkpoint and started again it ends with the numbers of a run in one piece."""
    command = [sys.executable, str(EXAMPLES / "uci_regression.py"), "--epochs", "40", "--samples", "5"]
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stderr
    assert "log likelihood" in whole.stdout
    assert (tmp_path / "whole" / "uci_diabetes.png").stat().st_size > 500
    checkpoints = tmp_path / "checkpoints"
    command += ["--out", str(tmp_path / "resumed"), "--checkpoint-dir", str(checkpoints)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        while killed.poll() is None and not any(p.name.isdigit() for p in checkpoints.glob("*/steps/*")):
            time.sleep(0.01)
        killed.kill()
    assert killed.returncode != 0  # it was still at work
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert int(re.search(r"(\d+)/\d+ \[", resumed.stderr)[1]) > 0  # where the first bar begins
    splits = [json.loads((tmp_path / of / "uci_diabetes.json").read_text())["splits"] for of in ("whole", "resumed")]
    assert splits[0] == splits[1]
