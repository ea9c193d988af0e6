"""The examples run from the command line, in small, and write what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
RUNS = {
    "mask_gallery": ([], "panels", ["mask_gallery.png"]),
    "uci_regression": (
        ["--epochs", "2", "--samples", "5"],
        "log likelihood",
        ["uci_diabetes.json", "uci_diabetes.png"],
    ),
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
