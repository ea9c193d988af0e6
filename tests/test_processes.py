"""Several processes: the masks of one, a process that is killed, and going on with another number of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dropjax.training import fit
from examples import multi_process as example
from tests import fit_me
from tests.test_checkpoints import steps_of

pytestmark = pytest.mark.slow
ARGS = example.parse(["--quiet", "--steps", "24", "--checkpoint-every", "4"])


def agree(run, alone):
    """Losses and last parameters are those of one process, but for the order of float32 sums.

    Two orders of a sum of n numbers differ by at most n eps times the sum of their magnitudes; the n of a step are 16
    features, 32 units and 64 examples, and the steps' differences add up: `rounding` has the details.
    """
    got, want = run.results[0], alone.results[0]
    steps = len(got["losses"])
    last = want["parameters"][list(want["evaluated"]).index(steps)]
    np.testing.assert_allclose(got["losses"], want["losses"][:steps], rtol=0, atol=example.rounding(steps))
    np.testing.assert_allclose(got["parameters"][-1], last, rtol=0, atol=example.rounding(steps))


def test_a_killed_run_goes_on_with_other_numbers_of_processes(tmp_path):
    """One test, since all of it needs the same runs and starting a process takes seconds."""
    alone = example.launch(1, ARGS)
    assert alone.results, example.explain(alone)
    parameters = alone.results[0]["parameters"]
    assert np.abs(parameters[-1] - parameters[-2]).max() > 20 * example.rounding(24)  # four lost steps would show

    killed = example.launch(2, ARGS, kill_at=14, checkpoint_dir=tmp_path)
    assert killed.failed == 1
    assert killed.codes[1] == -signal.SIGKILL
    assert killed.codes[0] not in (0, -signal.SIGKILL)  # it ended by itself
    assert "Gloo" in killed.outputs[0]
    assert "fit: process 0 of 2 stopped here. If another one ended first" in killed.outputs[0]
    assert "worker 1 of 2 ended first, by SIGKILL" in example.explain(killed)
    assert steps_of(tmp_path) == [8, 12]

    four = example.launch(4, ARGS, steps=20, checkpoint_dir=tmp_path, shard_parameters=True)
    assert four.results, example.explain(four)
    assert [result["first"] for result in four.results] == [12] * 4
    agree(four, alone)
    one = example.launch(1, ARGS, checkpoint_dir=tmp_path)
    assert one.results, example.explain(one)
    assert one.results[0]["first"] == 20
    agree(one, alone)

    for run in (killed, four):
        assert all(mask.any() for mask in run.masks)
        np.testing.assert_array_equal(sum(mask.astype(int) for mask in run.masks), alone.masks[0])
    for run in (four, one):  # checksums of the masks of all steps, since step 0
        for result in run.results:
            np.testing.assert_array_equal(result["masks"], alone.results[0]["masks"][: len(result["masks"])])
    assert len(np.unique(alone.results[0]["masks"])) == 6


def test_the_others_end_when_the_coordinator_is_killed():
    run = example.launch(2, ARGS, kill_at=3, kill_worker=0)
    assert run.codes[0] == -signal.SIGKILL
    assert run.codes[1] not in (0, -signal.SIGKILL)
    assert "Gloo" in run.outputs[1] or "distributed service detected fatal errors" in run.outputs[1]


def test_the_parent_kills_what_takes_too_long():
    args = example.parse(["--quiet", "--timeout", "1"])
    run = example.launch(2, args)
    assert run.codes == [-signal.SIGKILL] * 2
    assert "no worker failed, but they took too long and were killed" in example.explain(run)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_do_not_outlive_their_parent():
    parent = subprocess.Popen([sys.executable, example.__file__, "--quiet"], stdout=subprocess.DEVNULL)

    def until(condition):
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.05)

    def children():
        return Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()

    def lives(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
        except OSError:
            return False

    until(children)
    workers = children()
    parent.kill()
    parent.wait()
    until(lambda: not any(map(lives, workers)))


def both(module, *args):
    """The outputs of two processes with a device each, and another order of hashes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *(str(a) + i for a in args), port, i],
            stdout=subprocess.PIPE, text=True, env={**environment, "PYTHONHASHSEED": i},
        )
        for i in "01"
    ]  # fmt: skip
    return [process.communicate(timeout=300)[0] for process in processes]


def test_the_checker_sees_the_devices_of_all_processes():
    for output in both("tests.watch_me"):
        assert "all differ\n" in output
        assert "drew the same mask: dropout on {'data': 0}, elements [0:2, 0:4], and dropout on {'data': 1}" in output


@pytest.mark.usefixtures("standard_promotion")
def test_all_processes_give_optimizers_the_loss_of_the_whole_batch_and_run_one_program(tmp_path):
    """To the letter, with the lines of the source; and where one fit follows another like it."""
    one, other = (output.splitlines()[-1] for output in both("tests.fit_me", tmp_path / "programs"))
    assert one == other
    alone = [fit_me.train(*run) for run in fit_me.RUNS]
    for got, want in zip(json.loads(one), alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    programs = [
        [[path.read_text() for path in sorted((tmp_path / f"programs{i}" / run).glob("*jit_step*"))] for run in "0123"]
        for i in "01"
    ]
    assert all(map(all, programs))
    assert programs[0] == programs[1]
    assert programs[0][3] == programs[0][2] != programs[0][1]


@pytest.mark.parametrize("name", ["state", "data"])
def test_arrays_of_one_process_alone_are_an_error(name, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    state = jnp.ones(3) if name == "state" else jnp.float32(1)
    remedy = {
        "state": r"jax.jit\(lambda state: state, out_shardings",
        "data": "jax.make_array_from_process_local_data",
    }[name]
    with pytest.raises(
        ValueError, match=rf"fit: {name} must lie on the devices of all processes, got .*3\] .* Place it with {remedy}"
    ):
        fit(
            lambda s, b, k: (s * b).sum(), state, optax.sgd(0.1), lambda step: np.ones(3, np.float32), seed=0, steps=2,
            progress=False,
        )  # fmt: skip
