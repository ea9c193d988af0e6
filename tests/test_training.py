"""fit: all three kinds of state, losses that break, and bad arguments."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

from dropjax.training import fit
from tests import kill_me

pytestmark = pytest.mark.usefixtures("standard_promotion")
KINDS = pytest.mark.parametrize("kind", ["linen", "nnx", "plain"])


@KINDS
def test_training_learns_and_leaves_its_input_alone(kind):
    loss_fn, state = kill_me.arguments(kind)
    before = kill_me.words(type("R", (), {"state": state, "optimizer_state": 0 * jnp.ones(1), "losses": np.zeros(1)}))
    result = fit(loss_fn, state, optax.adam(1e-2), kill_me.data, seed=0, steps=150, progress=False)
    assert result.losses.shape == (150,)
    assert result.losses[-20:].mean() < 0.8 * result.losses[:20].mean()
    after = kill_me.words(type("R", (), {"state": state, "optimizer_state": 0 * jnp.ones(1), "losses": np.zeros(1)}))
    assert before == after
    assert type(result.state) is type(state) or kind == "linen"


def test_same_seed_same_result_other_seed_other_result():
    loss_fn, state = kill_me.arguments("plain")
    runs = [fit(loss_fn, state, optax.sgd(0.1), kill_me.data, seed=s, steps=10, progress=False) for s in (0, 0, 1)]
    assert kill_me.words(runs[0]) == kill_me.words(runs[1])
    assert kill_me.words(runs[0]) != kill_me.words(runs[2])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"steps": -1}, ValueError, "fit: steps must be at least 0, got -1."),
        ({"seed": 1.5}, TypeError, "fit: seed must be an integer, got 1.5."),
        ({"checkpoint_every": 0}, ValueError, "fit: checkpoint_every must be at least 1, got 0."),
        ({"evaluate_every": 0}, ValueError, "fit: evaluate_every must be at least 1, got 0."),
        ({"data": [1]}, TypeError, "fit: data must be a function of the step, got [1] (list)."),
        ({"loss_fn": None}, TypeError, "fit: loss_fn must be a function, got None (NoneType)."),
        (
            {"loss_fn": lambda s, b, k: b[0].sum(0)},
            TypeError,
            "fit: loss_fn must return a float scalar, got float32[4].",
        ),
        (
            {"loss_fn": lambda s, b, k: (b[0].sum(), {"stats": 1})},
            ValueError,
            "fit: loss_fn must return the loss, or the loss and a mapping of changes",
        ),
        (
            {"state": {"w": np.arange(3)}},
            TypeError,
            "fit: state must have float arrays to train, got int64[3] at state['w'].",
        ),
        ({"state": kill_me.Linen()}, TypeError, "For a Linen module pass its variables, model.init(...)"),
        ({"loss_fn": lambda s, b, k: (b[0].sum(), b[0])}, ValueError, "fit: loss_fn must return the loss, or the loss"),
        ({"loss_fn": lambda s, b, k: None}, TypeError, "fit: loss_fn must return a float scalar, got None (NoneType)."),
        ({"seed": 2**32}, ValueError, "fit: seed must be below 2^32, got 4294967296."),
        ({"state": {"a": kill_me.Nnx(nnx.Rngs(0))}}, TypeError, "fit: state must be one nnx.Module, or hold none, got"),
        (
            {"state": {"w": np.ones(3, np.complex64)}},
            TypeError,
            "fit: state must have float arrays to train, got complex64[3]",
        ),
        ({"optimizer": {"w": np.ones(3)}}, TypeError, "fit: optimizer must be an optax transformation, got"),
        ({"evaluate": lambda state: 0.5}, TypeError, "fit: evaluate must return named numbers, got 0.5."),
        ({"checkpoint_dir": __file__}, ValueError, "fit: checkpoint_dir must be a folder, got the file"),
        ({"state": {}}, ValueError, "fit: state must have something to train, got {} (dict)."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(change, kind, message):
    loss_fn, state = kill_me.arguments("plain")
    options = {
        "loss_fn": loss_fn,
        "state": state,
        "optimizer": optax.sgd(0.1),
        "data": kill_me.data,
        "seed": 0,
        "steps": 2,
    }
    with pytest.raises(kind) as caught:
        fit(**{**options, **change}, progress=False)
    assert message in str(caught.value)


def test_nnx_loss_returns_no_collections():
    _, state = kill_me.arguments("nnx")
    with pytest.raises(ValueError, match="fit: loss_fn must return the loss, or the loss and a mapping of changes"):
        fit(
            lambda m, b, k: (jnp.mean(m(b[0])), {"accuracy": 1.0}), state, optax.sgd(0.1), kill_me.data, seed=0, steps=1
        )


def test_plain_installation_trains_without_a_bar(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    kill_me.train(None, "plain", 2, progress=None)
    assert capsys.readouterr().err == ""


def test_zero_steps():
    loss_fn, state = kill_me.arguments("plain")
    result = fit(loss_fn, state, optax.sgd(0.1), kill_me.data, seed=0, steps=0, progress=False)
    jax.tree.map(np.testing.assert_array_equal, result.state, state)
    assert result.losses.shape == (0,)


def test_progress_bar(capsys):
    kill_me.train(None, "plain", 5, progress=True, evaluate=lambda state: {"accuracy": 0.5}, evaluate_every=2)
    err = capsys.readouterr().err
    assert "5/5" in err
    assert "accuracy=0.5" in err


@pytest.mark.parametrize(("name", "options"), [("tqdm", {"progress": True}), ("orbax.checkpoint", {"folder": "x"})])
def test_missing_extras_are_named(name, options, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'dropjax\[train\]'"):
        kill_me.train(tmp_path if options.pop("folder", None) else None, "plain", 2, **options)


def test_nnx_streams_move_on():
    """The state beside the parameters follows the call: batch statistics and the counts of rng streams."""
    result = kill_me.train(None, "nnx", 6)
    assert int(result.state.dropout.rngs.count[...]) == 6
    assert float(jnp.abs(result.state.norm.mean[...]).sum()) > 0
    assert isinstance(result.state, nnx.Module)


def test_a_batch_in_a_reused_buffer():
    """jit may read the array after data() has been called for the next step."""
    buffer = np.empty((1200, 1200), np.float32)

    def data(step):
        buffer[...] = step
        return buffer

    def loss(w, b, key):
        return w + (b @ b @ b).mean() / 1200**2

    result = fit(loss, jnp.float32(0), optax.sgd(0.0), data, seed=0, steps=6, progress=False)
    np.testing.assert_allclose(result.losses, np.arange(6) ** 3, rtol=1e-5)


def test_carried_state_keeps_its_structure():
    state = {"params": {"w": jnp.ones(4)}, "ema": jnp.zeros(4, jnp.bfloat16), "cache": {}}
    for changed in [{"ema": jnp.zeros(4)}, {"cache": {"last": jnp.ones(3)}}]:
        with pytest.raises(ValueError, match="fit: loss_fn must keep names, shapes and dtypes of the state"):
            fit(
                lambda s, b, k: (s["params"]["w"].sum(), changed),  # noqa: B023
                state, optax.sgd(0.1), lambda step: 0.0, seed=0, steps=2, progress=False,
            )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_nnx_models_that_sow():
    class Sowing(kill_me.Nnx):
        def __call__(self, x):
            y = super().__call__(x)
            self.sow(nnx.Intermediate, "y", y)
            return y

    result = fit(kill_me.nnx_loss, Sowing(nnx.Rngs(0)), optax.sgd(0.1), kill_me.data, seed=0, steps=3, progress=False)
    assert np.isfinite(result.losses).all()


def test_optimizers_that_ask_for_the_loss():
    loss_fn, state = kill_me.arguments("plain")
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    assert fit(loss_fn, state, optimizer, kill_me.data, seed=0, steps=3, progress=False).losses.shape == (3,)


def test_the_kind_of_the_mapping_is_kept():
    loss_fn, state = kill_me.arguments("linen")
    result = fit(loss_fn, freeze(state), optax.sgd(0.1), kill_me.data, seed=0, steps=2, progress=False)
    assert isinstance(result.state, FrozenDict)
