"""The case study: it trains as Keras does, each network as if alone, and says what it found."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "examples" / "two_circles.py"
SPEC = importlib.util.spec_from_file_location("two_circles", PATH)
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]
EPOCHS = 40


def start(option):
    """A network whose numbers are arrays, as in the program."""
    return example.create(jax.random.key(3), example.Option(*map(jnp.float32, option)), example.circles(1))


@pytest.fixture(scope="module")
def keras_weights():
    """Weights of Keras's network after training from ours with a bound that holds it, without dropout."""
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        bound = keras.constraints.MaxNorm(0.1, 0)
        layers = [keras.layers.Dense(500, activation="relu", kernel_constraint=bound)]
        model = keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(1, activation="sigmoid")])
        params = start(example.Option(max_norm=0.1)).params
        model.set_weights(
            [np.asarray(params[layer][of]) for layer in ("hidden", "output") for of in ("kernel", "bias")]
        )
        model.compile(loss="binary_crossentropy", optimizer=keras.optimizers.Adam(1e-3, epsilon=1e-12))
        points, labels = (of[: example.TRAIN] for of in example.circles(1))
        for _ in range(EPOCHS):
            model.train_on_batch(points, labels[:, None])
        return [np.asarray(variable.value) for variable in model.weights]


def test_it_trains_as_keras_does(keras_weights, monkeypatch):
    """After 40 steps of 1e-3 weights agree to a hundredth of one step, but for those whose gradient passes 0.

    There Adam's step is ±1e-3, as rounding decides; these weights move logits by less than a hundredth of their
    spread. Epsilon is made too small to count, since Keras adds it to the root before its correction.
    """
    monkeypatch.setattr(example, "EPSILON", 1e-12)
    trained, _ = jax.jit(example.train, static_argnums=2)(start(example.Option(max_norm=0.1)), 0, EPOCHS)
    ours = [trained.params[layer][of] for layer in ("hidden", "output") for of in ("kernel", "bias")]
    for mine, theirs in zip(ours, keras_weights, strict=True):
        assert np.median(np.abs(mine - theirs)) < 1e-5
    names = "kernel", "bias"
    theirs = {"hidden": dict(zip(names, keras_weights[:2], strict=True))}
    theirs["output"] = dict(zip(names, keras_weights[2:], strict=True))
    expected, begun, found = (
        np.asarray(example.logits(params, example.circles(1).points))
        for params in (theirs, start(example.Option()).params, trained.params)
    )
    assert np.abs(expected - begun).max() > 0.1
    assert np.abs(found - expected).max() < 0.01 * expected.std()
    for kernel in (ours[0], keras_weights[0]):
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0).max(), 0.1, rtol=2e-6)


def test_networks_of_one_program_train_as_each_would_alone():
    options = [example.Option(0.4, 0.2, 0.1), example.Option(0.0), example.Option(0.9, 0.0, np.inf)]
    networks = [start(option) for option in options] + [start(example.Option())] * (8 * jax.device_count() - 3)
    alone = [jax.jit(example.train, static_argnums=2)(of, 5, 10) for of in networks[:3]]
    stacked = jax.tree.map(lambda *of: jnp.stack(of), *networks)
    together, accuracy = example.train_all(stacked, 5, 10)
    for i, (network, right) in enumerate(alone):
        for mine, theirs in zip(jax.tree.leaves(network.params), jax.tree.leaves(together.params), strict=True):
            np.testing.assert_allclose(theirs[i], mine, atol=1e-5)
        assert accuracy.shape == (len(networks), 2)
        np.testing.assert_allclose(accuracy[i], right, atol=0.05)


def test_options_of_a_seed_share_their_weights_and_a_rate_changes_them():
    a, b = start(example.Option()), start(example.Option(0.4))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a.params, b.params)))
    step = jax.jit(example.step)
    assert np.abs(step(a, 0).params["hidden"]["kernel"] - step(b, 0).params["hidden"]["kernel"]).max() > 1e-4


def test_the_interval_is_that_of_student():
    """Of 1, 2, 3 and 6 the mean is 3, the standard error 2.1602 / 2, and t of 3 degrees of freedom 3.1824."""
    mean, half = example.interval(np.array([1.0, 2, 3, 6]))
    np.testing.assert_allclose([mean, half], [3, 3.1824 * 2.1602 / 2], rtol=1e-4)


def test_the_command_line(tmp_path):
    command = [sys.executable, str(PATH), "--out", str(tmp_path / "new"), "--seeds", "2", "--epochs", "30"]
    ran = subprocess.run([*command, "--every", "20", "--quiet"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    about = json.loads((tmp_path / "new" / "two_circles.json").read_text())
    values = np.array(about["accuracies"]["values"])
    assert values.shape == (2, len(example.OPTIONS), 2, 2)
    for kind, of in zip(example.SETS, values, strict=True):
        for row, (name, option) in zip(about["results"][kind].values(), example.OPTIONS.items(), strict=True):
            given = of[list(example.OPTIONS).index(name), :, 1]
            np.testing.assert_allclose(row["test"], given.mean(), atol=1e-4)
            np.testing.assert_allclose(row["difference"], (given - of[0, :, 1]).mean(), atol=2e-4)
            assert row["largest_norm"] <= option.max_norm * (1 + 1e-6)
            assert name in ran.stdout
    assert (tmp_path / "new" / "two_circles.png").stat().st_size > 50_000


@pytest.mark.parametrize("option", [["--seeds", "1"], ["--epochs", "0"], ["--seed", "-1"], ["--every", "0"]])
def test_bad_options_are_errors(option, capsys):
    with pytest.raises(SystemExit) as caught:
        example.main(option)
    assert caught.value.code == 2
    assert f"argument {option[0]}" in capsys.readouterr().err
