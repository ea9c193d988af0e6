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
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dropjax
from dropjax import schedules
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


@pytest.mark.slow
@KINDS
def test_stopping_and_going_on_is_the_same_as_going_through(kind, tmp_path):
    through = kill_me.train(None, kind, 20)
    kill_me.train(tmp_path, kind, 7)
    first = kill_me.train(tmp_path, kind, 13)
    assert first.losses.tobytes() == through.losses[:13].tobytes()
    assert kill_me.words(kill_me.train(tmp_path, kind, 20)) == kill_me.words(through)
    assert kill_me.words(kill_me.train(tmp_path, kind, 20)) == kill_me.words(through)  # nothing left to do


OPTIMIZERS = {
    "lbfgs": lambda: optax.lbfgs(memory_size=2, linesearch=optax.scale_by_backtracking_linesearch(3, store_grad=True)),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 6)),
    "plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    "injected": lambda: optax.inject_hyperparams(optax.polyak_sgd)(max_learning_rate=0.5),
    "every two steps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
}


def scheduled_loss(w, batch, key):
    """The rate is a function of the step, which comes with the batch."""
    kept = dropjax.dropout(key, w, schedules.linear(0.0, 0.5, 6)(batch["step"]))
    return ((kept - batch["x"]).astype(jnp.float32) ** 2).mean()


def scheduled(folder, optimizer, steps, state=None):
    return fit(
        scheduled_loss, jnp.ones(5) if state is None else state, optimizer,
        lambda step: {"step": step, "x": np.linspace(1, 2 + step, 5, dtype=np.float32)}, seed=0, steps=steps,
        checkpoint_dir=folder, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_rates_go_on_from_the_step(name, tmp_path):
    through = scheduled(None, OPTIMIZERS[name](), 6)
    scheduled(tmp_path, OPTIMIZERS[name](), 3)
    assert kill_me.words(scheduled(tmp_path, OPTIMIZERS[name](), 6)) == kill_me.words(through)


def test_optimizers_whose_state_changes_its_dtype_go_on(tmp_path):
    """In bfloat16: the state keeps the dtypes that it began with, as a checkpoint needs."""
    optimizer, state = optax.contrib.dog(1.0), jnp.ones(5, jnp.bfloat16)
    before = [leaf.dtype for leaf in jax.tree.leaves(optimizer.init(state))]
    through = scheduled(None, optimizer, 4, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(through.optimizer_state)] == before
    scheduled(tmp_path, optimizer, 2, state)
    assert kill_me.words(scheduled(tmp_path, optimizer, 4, state)) == kill_me.words(through)


def test_losses_of_float64_are_saved_as_they_are(tmp_path):
    def go(steps):
        return fit(
            lambda w, b, k: b + 0 * w, jnp.zeros(()), optax.sgd(0.1), lambda step: 1e300 + step * 1e290, seed=0,
            steps=steps, checkpoint_dir=tmp_path, progress=False,
        )  # fmt: skip

    with jax.enable_x64(True):
        go(2)
        assert list(go(4).losses) == [1e300 + step * 1e290 for step in range(4)]


@pytest.mark.parametrize(("steps", "apart"), [(600, 60), (50, 10), (215, 21), (20_000, 1000), (9_999, 999)])
def test_a_run_is_saved_at_each_tenth_unless_said_otherwise(steps, apart, tmp_path):
    """An interrupted run loses a tenth at most, and no more than 1000 steps."""
    stop = min(steps, 2 * apart + apart // 2 + 1)

    def data(step):
        if step == stop - 1:
            raise KeyboardInterrupt
        return np.float32(step)

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(
            lambda w, b, k: ((w - b) ** 2).sum(), jnp.zeros(2), optax.sgd(1e-3), data, seed=0, steps=steps,
            checkpoint_dir=tmp_path, progress=False,
        )  # fmt: skip
    last = (stop - 1) // apart * apart
    assert steps_of(tmp_path) == [last - apart, last]
    assert caught.value.__notes__ == [
        f"fit: {tmp_path} holds the checkpoint of step {last}, from which the same call continues."
    ]


def test_an_error_says_what_is_kept(tmp_path):
    def evaluate(state):
        raise OSError("no space")

    for note in ("no checkpoint yet", "the checkpoint of step 3"):
        with pytest.raises(OSError, match="no space") as caught:
            kill_me.train(tmp_path, "plain", 6, evaluate=evaluate, evaluate_every=2 if note[0] == "n" else 5)
        assert caught.value.__notes__ == [f"fit: {tmp_path} holds {note}, from which the same call continues."]
    assert kill_me.words(kill_me.train(tmp_path, "plain", 6)) == kill_me.words(kill_me.train(None, "plain", 6))


def test_a_run_that_saves_nothing_before_its_end_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"fit: checkpoint_every is 3, more than the 2 steps: nothing is saved") as all:
        kill_me.train(tmp_path, "plain", 2)
    assert all[0].filename == kill_me.__file__
    kill_me.train(tmp_path, "plain", 2)  # with nothing left to do, nothing is lost


@pytest.mark.slow
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
