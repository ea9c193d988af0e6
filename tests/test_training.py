"""fit: all three kinds of state, optimizers that ask for the loss, losses that break, and bad arguments."""

import math
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import dropjax
from dropjax import _step, training
from dropjax.training import fit
from tests import kill_me
from tests.fit_me import line, looking

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiler")
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
        ({"data": iter([1])}, TypeError, "An iterator cannot go back to the step at which a run continues."),
        (
            {"data": lambda: 1},
            TypeError,
            "fit: data must take 1 positional argument, step, got a function of () (too many positional arguments).",
        ),
        (
            {"loss_fn": lambda weights, x: 0.0},
            TypeError,
            "got a function of (weights, x) (too many positional arguments). Wrap it: lambda state, batch, key: ...",
        ),
        ({"loss_fn": lambda: 0.0}, TypeError, "fit: loss_fn must take 3 positional arguments, state, batch, key, got"),
        ({"loss_fn": lambda w, x, y, key: 0.0}, TypeError, "got a function of (w, x, y, key) (missing a required"),
        ({"loss_fn": lambda w, batch, *, key: 0.0}, TypeError, "got a function of (w, batch, *, key) (too many"),
        ({"loss_fn": kill_me.Nnx(nnx.Rngs(0))}, TypeError, "fit: loss_fn must take 3 positional arguments, state, "),
        ({"evaluate": 0.5}, TypeError, "fit: evaluate must be a function of the state, got 0.5."),
        ({"evaluate": lambda: {}}, TypeError, "fit: evaluate must take 1 positional argument, state, got a function"),
        ({"steps": 2.0}, TypeError, "fit: steps must be an integer, got 2.0."),
        ({"progress": "no"}, TypeError, "fit: progress must be True or False, got 'no' (str)."),
        ({"checkpoint_dir": 3}, TypeError, "fit: checkpoint_dir must be a path, got 3."),
        ({"optimizer": optax.adam}, TypeError, "got adam (function). Build one, as optax.adam(1e-3); put several"),
        ({"optimizer": optax.MultiSteps}, TypeError, "got MultiSteps (type). Build one"),
        ({"optimizer": [optax.sgd(0.1)]}, TypeError, "fit: optimizer must be an optax transformation, got"),
        (
            {"optimizer": nnx.Optimizer(kill_me.Nnx(nnx.Rngs(0)), optax.sgd(0.1), wrt=nnx.Param)},
            TypeError,
            "of an nnx.Optimizer pass its tx.",
        ),
        ({"state": kill_me.Nnx}, TypeError, "fit: state must be what is trained, got the class Nnx. Build the model"),
        ({"state": kill_me.Linen}, TypeError, "fit: state must be what is trained, got the class Linen."),
        ({"data": lambda step: (row for row in [])}, TypeError, "fit: data must return arrays, or a tree of them, got"),
        ({"data": lambda step: {"x": ["a"]}}, TypeError, "got 'a' (str) at data(0)['x'][0]. Convert numbers with"),
        ({"data": lambda step: np.array(["a"])}, TypeError, "fit: data must return arrays, or a tree of them, got"),
        ({"data": lambda step: 2**40}, TypeError, "got 1099511627776 at data(0)."),
        ({"loss_fn": lambda s, b, k: (b[0].sum(), {}, 1)}, TypeError, "fit: loss_fn must return a float scalar, got"),
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
        ({"checkpoint_dir": __file__}, ValueError, "fit: checkpoint_dir must be a folder, got the file"),
        ({"state": {}}, ValueError, "fit: state must have something to train, got {} (dict)."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(change, kind, message, capsys):
    """Each is an error before a progress bar is drawn."""
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
        fit(**{"progress": True, **options, **change})
    assert message in str(caught.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("measured", "described"),
    [
        (0.5, "0.5"),
        ({"error": jnp.ones(3)}, "float32[3] for 'error'"),
        ({"name": "a"}, "'a' (str) for 'name'"),
        ({"nothing": None}, "None (NoneType) for 'nothing'"),
    ],
    ids=str,
)
def test_evaluate_returns_named_numbers(measured, described):
    with pytest.raises(TypeError) as caught:
        kill_me.train(None, "plain", 1, evaluate=lambda state: measured)
    assert str(caught.value) == f"fit: evaluate must return named numbers, got {described}."


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


def multi_steps(optimizer):
    return optax.MultiSteps(optimizer, 2)


ASKING = {
    "lbfgs": lambda: optax.lbfgs(memory_size=2),
    "lbfgs, backtracking": lambda: optax.lbfgs(memory_size=1, linesearch=optax.scale_by_backtracking_linesearch(4)),
    "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(3)),
    "backtracking": lambda: line(store_grad=True),
    "polyak": lambda: optax.polyak_sgd(0.5),
    "momo": lambda: optax.contrib.momo(0.5),
    "momo_adam": lambda: optax.contrib.momo_adam(0.1),
    "plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    "sophia": lambda: optax.contrib.sophia(0.1),
    "sophia and a line": lambda: optax.chain(optax.contrib.sophia(1.0), optax.scale(-1.0), line()),
    "injected": lambda: optax.inject_hyperparams(optax.polyak_sgd)(max_learning_rate=0.5),
    "if finite": lambda: optax.apply_if_finite(line(), 2),
    "masked": lambda: optax.masked(line(), {"a": True, "b": True}, mask_compatible_extra_args=True),
    "every two steps": lambda: multi_steps(line()),
    "every two steps, as a transformation": lambda: multi_steps(optax.polyak_sgd(0.5)).gradient_transformation(),
}


def small_loss(weights, batch, key):
    """Of dropped parameters: with other masks it is another function."""
    x = dropjax.dropout(key, jnp.concatenate([weights["a"], weights["b"]]), 0.3)
    return ((x - batch) ** 2).mean()


def small_batch(step):
    return np.linspace(1, 2 + step, 5, dtype=np.float32)


def key_of(seed, step):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), training._DOMAIN), step)


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKING)
def test_optimizers_that_ask_for_the_loss_do_what_they_do_by_hand(name):
    state = {"a": jnp.zeros(3), "b": jnp.ones(2)}
    result = fit(small_loss, state, ASKING[name](), small_batch, seed=5, steps=3, progress=False)
    optimizer = ASKING[name]()
    optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)  # of MultiSteps, too

    @jax.jit
    def by_hand(weights, optimizer_state, batch, key):
        def value_fn(weights):
            return small_loss(weights, batch, key)

        value, grad = jax.value_and_grad(value_fn)(weights)
        asked = {"value": value, "grad": grad, "value_fn": value_fn}
        if name == "sophia and a line":  # a line search refuses what its function does not take
            (sophia, search), (first, scale, second) = (optax.contrib.sophia(1.0), line()), optimizer_state
            updates, first = sophia.update(grad, first, weights, obj_fn=value_fn)
            updates, second = search.update(jax.tree.map(jnp.negative, updates), second, weights, **asked)
            return optax.apply_updates(weights, updates), (first, scale, second), value
        asked = {"obj_fn": value_fn} if name == "sophia" else asked
        updates, optimizer_state = optimizer.update(grad, optimizer_state, weights, **asked)
        return optax.apply_updates(weights, updates), optimizer_state, value

    weights, optimizer_state, losses = state, optimizer.init(state), []
    for step in range(3):
        weights, optimizer_state, value = by_hand(weights, optimizer_state, small_batch(step), key_of(5, step))
        losses.append(value)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    chex.assert_trees_all_close(result.state, weights, rtol=1e-4, atol=1e-6)
    assert np.abs(result.state["a"]).max() > 0


def test_a_line_search_over_a_part_of_the_parameters():
    """The others stay as they are in its loss: as if they were constants."""
    state = {"a": jnp.zeros(3), "b": jnp.ones(2)}
    parted = optax.partition(
        {"searched": line(), "fixed": optax.set_to_zero()}, {"a": "searched", "b": "fixed"},
        mask_compatible_extra_args=True,
    )  # fmt: skip
    alone = fit(
        lambda w, b, k: small_loss({**w, "b": state["b"]}, b, k), {"a": state["a"]}, line(), small_batch, seed=5,
        steps=3, progress=False,
    )  # fmt: skip
    result = fit(small_loss, state, parted, small_batch, seed=5, steps=3, progress=False)
    np.testing.assert_allclose(result.state["a"], alone.state["a"], rtol=1e-5)
    np.testing.assert_array_equal(result.state["b"], state["b"])


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.partition({"a": line(), "b": optax.sgd(0.1)}, {"a": "a", "b": "b"}),
        optax.chain(optax.clip(1.0), multi_steps(optax.polyak_sgd()).gradient_transformation()),
    ],
    ids=["partition", "chain"],
)
def test_wrappers_that_keep_the_loss_from_an_optimizer_are_named(optimizer):
    with pytest.raises((TypeError, ValueError)) as caught:
        fit(small_loss, {"a": jnp.zeros(3), "b": jnp.ones(2)}, optimizer, small_batch, seed=0, steps=1)
    assert "fit: the optimizer failed, not the loss. In optax.partition" in "".join(caught.value.__notes__)


@KINDS
def test_the_loss_as_a_function_is_the_loss_of_this_step(kind):
    """With its batch, its masks, and the state carried along as it was before: another mask would differ by 0.1."""
    loss_fn, state = kill_me.arguments(kind)
    result = fit(loss_fn, state, looking(optax.adam(1e-2)), kill_me.data, seed=0, steps=2, progress=False)
    seen = {name: float(seen) for name, seen in result.optimizer_state.items() if name != "inner"}
    np.testing.assert_allclose([seen["value"], seen["again"]], result.losses[-1], rtol=1e-6)
    assert seen["apart"] < 1e-5
    plain = fit(loss_fn, state, optax.adam(1e-2), kill_me.data, seed=0, steps=2, progress=False)
    np.testing.assert_allclose(result.losses, plain.losses, rtol=1e-6)  # carried along once, whatever looks


MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "disable_jit": jax.disable_jit,
    "checking_leaks": jax.checking_leaks,
    "enable_checks": lambda: jax.enable_checks(True),
    "debug_key_reuse": lambda: jax.debug_key_reuse(True),
    "x64": lambda: jax.enable_x64(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
}


@pytest.fixture(scope="module")
def looked_at():
    """A loss and a state for each kind, and the losses of three steps."""
    models = {"plain": kill_me.arguments("plain"), "nnx": kill_me.arguments("nnx")}
    return {kind: (*model, three_steps(*model).losses) for kind, model in models.items()}


def three_steps(loss_fn, state):
    return fit(loss_fn, state, looking(optax.adam(1e-2)), kill_me.data, seed=0, steps=3, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_under_the_ways_in_which_jax_looks(mode, looked_at):
    """Flax's layers lean on promotion themselves: there, of the plain function."""
    for loss_fn, state, losses in looked_at.values() if "promotion" not in mode else [looked_at["plain"]]:
        with MODES[mode]():
            result = three_steps(loss_fn, state)
        np.testing.assert_allclose(result.losses, losses, rtol=1e-5)


def test_optimizers_that_ask_for_nothing_compile_to_what_they_did():
    """To the letter: neither the loss as a function nor its cast leaves a trace."""
    loss_fn, state = kill_me.arguments("plain")
    parts, inputs = _step.checked_parts(state), (kill_me.data(0), jax.random.key(0))

    def text(optimizer):
        step = _step.jitted(loss_fn, optimizer, parts)
        return step.lower(state, optimizer.init(state), {}, *inputs).as_text()

    adam = optax.adam(1e-2)
    asking = optax.GradientTransformationExtraArgs(adam.init, lambda u, s, p=None, **asked: adam.update(u, s, p))
    assert text(adam) == text(asking)
    assert text(adam) != text(looking(adam))


@pytest.mark.parametrize(
    ("optimizer", "times"),
    [(optax.adam(0.1), 1), (optax.lbfgs(memory_size=1), 3), (optax.contrib.momo(), 1)],
    ids=["adam", "lbfgs", "momo"],
)
def test_the_loss_is_traced_for_the_first_step_alone(optimizer, times):
    """Also where the state begins as numbers, or with weak types."""
    traces = []

    def loss(w, batch, key):
        traces.append(w)
        return ((w["a"] - batch["x"]) ** 2).sum() + w["b"] ** 2

    state = {"a": np.zeros(3), "b": jnp.asarray(2.0)}
    fit(loss, state, optimizer, lambda step: {"x": 1.0 + step}, seed=0, steps=4, progress=False)
    assert len(traces) == times


@pytest.mark.parametrize(
    "batch",
    [
        {"x": np.ones(3), "scale": 2.0, "n": 1, "on": True},
        (np.float64(1), [jnp.ones(3)], None),
        np.ones(3, np.float16),
        jax.random.key(1),
        jnp.ones(3, jnp.bfloat16),
        3,
        None,
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_batches_and_parameters_of_many_kinds(batch, dtype):
    def loss(w, batch, key):
        numbers = [leaf for leaf in jax.tree.leaves(batch) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        return sum((jnp.sum(leaf) * 0 for leaf in numbers), (w**2).sum())

    result = fit(loss, jnp.ones(3, dtype), optax.sgd(0.125), lambda step: batch, seed=0, steps=2, progress=False)
    assert result.state.dtype == dtype
    np.testing.assert_array_equal(result.losses, [3.0, 1.6875])


def test_losses_keep_the_digits_that_their_mean_needs():
    """1e5 ± 1: float32 sums would be off by 0.01 or more."""
    noise = np.random.default_rng(0).normal(size=3000).astype(np.float32)

    def data(step):
        return np.float32(1e5) + noise[step % 3000]

    result = fit(lambda w, b, k: b + 0 * w, jnp.zeros(()), optax.sgd(0.1), data, seed=0, steps=3000, progress=False)
    exact = [float(data(step)) for step in range(3000)]
    np.testing.assert_allclose(result.losses.mean(), math.fsum(exact) / 3000, rtol=1e-13)
    np.testing.assert_allclose(result.losses.std(), np.std(np.array(exact) - 1e5), rtol=1e-9)


@pytest.mark.parametrize("value", [1e300, 1e9 + 1e-3, -1e-300])
def test_losses_of_float64(value):
    with jax.enable_x64(True):
        result = fit(
            lambda w, b, k: b + 0 * w, jnp.zeros(()), optax.sgd(0.1), lambda step: value, seed=0, steps=2,
            progress=False,
        )  # fmt: skip
    assert list(result.losses) == [value] * 2


def test_an_evaluation_that_is_nan_is_shown(capsys):
    result = kill_me.train(None, "plain", 2, progress=True, evaluate=lambda state: {"a": np.nan, "b": -jnp.inf})
    assert str(result.history) == "[(2, {'a': nan, 'b': -inf})]"
    assert "a=nan, b=-inf" in capsys.readouterr().err


def test_the_kind_of_the_mapping_is_kept():
    loss_fn, state = kill_me.arguments("linen")
    result = fit(loss_fn, freeze(state), optax.sgd(0.1), kill_me.data, seed=0, steps=2, progress=False)
    assert isinstance(result.state, FrozenDict)
