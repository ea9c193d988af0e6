"""Checkpoints of fit: exact resume after a real kill, damage, and runs that are not the same."""

import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dropjax.training import fit
from tests import kill_me

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # TensorStore may finish reads of a damaged checkpoint after Orbax has closed the loop that waited for them.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
KINDS = pytest.mark.parametrize("kind", ["linen", "nnx", "plain"])


def steps_of(folder):
    return sorted(int(p.name) for p in (folder / "steps").iterdir() if p.name.isdigit())


@KINDS
def test_stopping_and_going_on_is_the_same_as_going_through(kind, tmp_path):
    through = kill_me.train(None, kind, 20)
    kill_me.train(tmp_path, kind, 7)
    first = kill_me.train(tmp_path, kind, 13)
    assert first.losses.tobytes() == through.losses[:13].tobytes()
    assert kill_me.words(kill_me.train(tmp_path, kind, 20)) == kill_me.words(through)
    assert kill_me.words(kill_me.train(tmp_path, kind, 20)) == kill_me.words(through)  # nothing left to do


@KINDS
def test_killed_at_any_moment_and_started_again_ends_with_the_same_bits(kind, tmp_path):
    """A real SIGKILL, at moments that fall into steps and into the writing of checkpoints."""
    steps = 120
    command = [sys.executable, "-W", "ignore", "-m", "tests.kill_me", str(tmp_path), kind, str(steps)]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    rng, kills = np.random.default_rng({"linen": 0, "nnx": 1, "plain": 2}[kind]), 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)
        assert process.stdout.readline() == "imported\n"
        written = steps_of(tmp_path) if (tmp_path / "steps").exists() else []
        patience = time.monotonic() + 120
        while kills < 2 and process.poll() is None and time.monotonic() < patience:
            if (tmp_path / "steps").exists() and steps_of(tmp_path) > written:
                time.sleep(rng.uniform(0, 0.1))
                process.send_signal(signal.SIGKILL)
                process.wait()
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills == 2
    assert kill_me.words(kill_me.train(tmp_path, kind, steps)) == kill_me.words(kill_me.train(None, kind, steps))


def damage(path, how):
    files = [p for p in path.rglob("*") if p.is_file()]
    if how in ("flipped", "truncated"):  # all data files, since Orbax may keep more than one copy
        for file in (p for p in files if p.is_relative_to(path / "arrays") and p.parent.name == "d"):
            data = bytearray(file.read_bytes())
            if how == "flipped":
                data[len(data) // 2] ^= 1
            file.write_bytes(data if how == "flipped" else data[:-20])
    elif how == "emptied":
        for file in files:
            file.write_bytes(b"")
    elif how == "gone":
        shutil.rmtree(path / "arrays")
    elif how == "about":
        about = path / "about" / "metadata"
        about.write_text(about.read_text().replace('"seed": 3', '"seed": 4'))


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "gone", "about"])
def test_a_broken_checkpoint_is_passed_over_and_the_last_good_one_kept(how, tmp_path):
    through = kill_me.train(None, "plain", 12)
    kill_me.train(tmp_path, "plain", 9)
    assert steps_of(tmp_path) == [6, 9]
    damage(tmp_path / "steps" / "9", how)
    with pytest.warns(UserWarning, match="fit: the checkpoint of step 9 in .* is broken and was moved to broken/"):
        result = kill_me.train(tmp_path, "plain", 6)
    assert steps_of(tmp_path) == [6]
    assert (tmp_path / "broken" / "9").exists()
    assert kill_me.words(kill_me.train(tmp_path, "plain", 12)) == kill_me.words(through)
    assert result.losses.tobytes() == through.losses[:6].tobytes()


def test_if_all_checkpoints_are_broken_training_starts_again(tmp_path):
    kill_me.train(tmp_path, "plain", 6)
    for step in steps_of(tmp_path):
        damage(tmp_path / "steps" / str(step), "emptied")
    with pytest.warns(UserWarning, match="is broken"):
        assert kill_me.words(kill_me.train(tmp_path, "plain", 6)) == kill_me.words(kill_me.train(None, "plain", 6))


def test_a_half_written_checkpoint_is_not_loaded(tmp_path):
    kill_me.train(tmp_path, "plain", 6)
    half = tmp_path / "steps" / "9.orbax-checkpoint-tmp-1"
    shutil.copytree(tmp_path / "steps" / "6", half)
    assert kill_me.words(kill_me.train(tmp_path, "plain", 9)) == kill_me.words(kill_me.train(None, "plain", 9))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_and_saves_nothing_after(bad, tmp_path):
    def data(step):
        x, y = kill_me.data(step)
        return x, y * (bad if step == 7 else 1)

    loss_fn, state = kill_me.arguments("plain")
    with pytest.raises(
        FloatingPointError, match=r"fit: the loss must be finite, got (nan|inf) at step 7\. Nothing was saved"
    ):
        fit(
            loss_fn,
            state,
            optax.sgd(0.1),
            data,
            seed=3,
            steps=20,
            checkpoint_dir=tmp_path,
            checkpoint_every=2,
            progress=False,
        )
    assert steps_of(tmp_path) == [4, 6]


def test_evaluation_and_history_survive_a_restart(tmp_path):
    seen = []

    def evaluate(state):
        seen.append(state)
        return {"norm": jnp.linalg.norm(state["last"])}

    options = {"evaluate": evaluate, "evaluate_every": 4}
    kill_me.train(tmp_path, "plain", 9, **options)
    result = kill_me.train(tmp_path, "plain", 14, **options)
    assert [step for step, _ in result.history] == [4, 8, 9, 12, 14]
    assert result.history[-1][1] == {"norm": float(jnp.linalg.norm(result.state["last"]))}
    assert all(jnp.isfinite(state["last"]).all() for state in seen)  # what evaluate keeps stays alive


def test_other_runs_are_not_continued(tmp_path):
    loss_fn, state = kill_me.arguments("plain")
    common = {"steps": 4, "checkpoint_dir": tmp_path, "progress": False}
    fit(loss_fn, state, optax.sgd(0.1), kill_me.data, seed=0, **common)
    with pytest.raises(ValueError, match=r"fit: seed must be 0, as in checkpoint_dir .*, got 1"):
        fit(loss_fn, state, optax.sgd(0.1), kill_me.data, seed=1, **common)
    with pytest.raises(ValueError, match="fit: state and optimizer must be those of the checkpoint"):
        fit(loss_fn, state, optax.adam(0.1), kill_me.data, seed=0, **common)
    with pytest.raises(ValueError, match="fit: steps must be at least 4, as in checkpoint_dir, got 3"):
        fit(loss_fn, state, optax.sgd(0.1), kill_me.data, seed=0, **{**common, "steps": 3})
    assert steps_of(tmp_path) == [4]


def test_an_infinite_gradient_of_a_finite_loss_stops(tmp_path):
    def loss(w, batch, key):
        return jnp.sqrt(jnp.maximum(w - batch, 0)).sum()

    with pytest.raises(FloatingPointError, match="fit: the updated state must be finite, it is not at step 3"):
        fit(
            loss, jnp.zeros(2), optax.sgd(0.0), lambda step: jnp.float32(-1 if step < 3 else 0), seed=0, steps=8,
            checkpoint_every=1, checkpoint_dir=tmp_path, progress=False,
        )  # fmt: skip
    assert steps_of(tmp_path) == [2, 3]


def test_empty_arrays_and_names_that_are_no_strings_are_saved(tmp_path):
    def go(steps):
        return fit(
            lambda s, b, k: (s["w"] ** 2).sum(), {"w": jnp.ones(4), "none": jnp.zeros((0, 3))}, optax.sgd(0.1),
            lambda step: 0.0, seed=0, steps=steps, evaluate=lambda s: {5: s["w"][0], 10: 0.0}, checkpoint_dir=tmp_path,
            progress=False,
        )  # fmt: skip

    go(3)
    result = go(6)
    assert result.state["none"].shape == (0, 3)
    assert [step for step, _ in result.history] == [3, 6]


def test_a_state_on_a_mesh_goes_on_where_it_lay(tmp_path):
    """Also beside arrays that no device is chosen for, as those that optimizers make."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = {"first": NamedSharding(mesh, P(None, "data")), "last": NamedSharding(mesh, P("data"))}
    loss_fn, state = kill_me.arguments("plain")

    def go(steps):
        return fit(
            loss_fn, jax.device_put(state, sharding), optax.adam(1e-2), kill_me.data, seed=0, steps=steps,
            checkpoint_dir=tmp_path, progress=False,
        )  # fmt: skip

    before = go(4)
    result = go(4)
    assert jax.tree.map(lambda leaf: leaf.sharding, result.state) == sharding
    assert kill_me.words(result) == kill_me.words(before)
    assert np.isfinite(go(6).losses).all()
