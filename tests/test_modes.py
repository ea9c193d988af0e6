"""JAX's own ways of looking, over the whole package: `pytest -m modes`, one process a mode, two at a time."""

import concurrent.futures
import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax import constraints, mc, schedules
from dropjax.functional import structured
from tests.modes import MODES, SHAPE, array_rate, inputs, table
from tests.variants import OTHER_LAYERS, OTHERS, VARIANTS

WITHOUT = {"enable_x64": ("threefry",)}  # whose masks would not be those of jax.random.bernoulli, which is an error


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")

    def run(mode):
        file = folder / f"{mode}.pickle"
        command = [sys.executable, "-m", "tests.modes", mode, str(file)]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-2000:]
        return pickle.loads(file.read_bytes())

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {mode: pool.submit(run, mode) for mode in MODES}


@pytest.mark.modes
@pytest.mark.parametrize("mode", MODES)
def test_every_row_gives_what_it_gives_without_the_mode(mode, runs):
    failed, plain = [], runs["plain"].result()
    for name, arrays in runs[mode].result().items():
        if any(part in name for part in WITHOUT.get(mode, ())):
            continue
        if isinstance(arrays, str) or isinstance(plain[name], str):
            failed.append(f"{name}: {arrays if isinstance(arrays, str) else plain[name]}")
            continue
        for a, b in zip(arrays, plain[name], strict=True):
            if (a.dtype != b.dtype and b.dtype.kind == "f") or a.shape != b.shape:
                failed.append(f"{name}: {a.dtype}{a.shape}, without the mode {b.dtype}{b.shape}")
            elif a.dtype.kind == "f" and not np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
                failed.append(f"{name}: off by {np.nanmax(np.abs(a - b))}")
    assert not failed, "\n".join([f"{len(failed)} rows under {mode}:", *failed])


def test_the_table_is_whole():
    """Every function and every layer has a row."""
    names = " ".join(name for name, _ in table())
    assert not [name for name in [*VARIANTS, *OTHERS] if name not in names]
    layers = [*OTHER_LAYERS, *(row.layer for row in VARIANTS.values())]
    for module in ("linen", "nnx"):
        wrappers = ["LayerDrop", "WeightDrop", "DropConnectDense", "Masksembles"]
        assert not [name for name in layers + wrappers if f"{module}.{name}" not in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "gaussian_noise"])
def test_a_nan_of_the_user_is_reported_as_such(name, key):
    """A jitted step with dropout of traced rates, and a logarithm of negative numbers."""
    row = VARIANTS[name]
    step = jax.jit(lambda x, rate: jnp.log(row.function(key, x, rate, **row.options) * 0 - 1).sum())
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"encountered in log"):
        step(inputs(), array_rate(row))


@pytest.mark.parametrize("rate", [0.3, np.float32(1)])
def test_a_nan_of_the_user_in_a_layer_that_may_be_left_out(rate, key):
    step = jax.jit(lambda x, rate: jnp.log(dropjax.layer_drop(key, lambda x: 2 * x, x, rate) * 0 - 1))
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"encountered in log"):
        step(inputs(), rate)


def test_a_bad_traced_rate_is_reported_by_its_value(key):
    """Where JAX meets the NaN it runs the step again without jit, where the rate is known."""
    with jax.debug_nans(True), pytest.raises(ValueError, match=r"dropout: rate must be in \[0, 1\], got 1\.5\."):
        jax.jit(lambda rate: dropjax.dropout(key, inputs(), rate))(1.5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"])
def test_a_bad_traced_rate_is_nan_in_every_dtype(dtype, key):
    x = inputs().astype(dtype)
    for function in [dropjax.dropout, dropjax.gaussian_dropout, dropjax.drop_head, dropjax.targeted_dropout]:
        y = jax.jit(lambda x, rate: function(key, x, rate))(x, jnp.float32(-0.5))  # noqa: B023
        assert jnp.isnan(y).all()
        assert y.dtype == dtype


def test_an_infinity_that_is_dropped_or_scaled_by_nothing_is_0(key):
    x = jnp.full(SHAPE, jnp.inf)
    for rate in (1, jnp.float32(1), jnp.ones((2, 1, 1))):
        assert (dropjax.apply_mask(x, jnp.ones(SHAPE, bool), rate) == 0).all()
        assert (dropjax.dropout(key, x, rate) == 0).all()
        assert (dropjax.drop_head(key, x, rate) == 0).all()


def test_infinite_logits_of_standout_are_sure(key):
    logits = jnp.array([-jnp.inf, jnp.inf, -jnp.inf, jnp.inf])
    assert dropjax.standout(key, jnp.ones(4), logits).tolist() == [0, 1, 0, 1]
    assert dropjax.standout_expectation(jnp.ones(4), logits, alpha=-1.0).tolist() == [1, 0, 1, 0]
    assert dropjax.standout_expectation(jnp.ones(4), logits, alpha=0.0, beta=0.0).tolist() == [0.5] * 4
    assert jnp.isnan(dropjax.standout_expectation(jnp.ones(4), jnp.nan)).all()
    slope = jax.grad(lambda alpha: dropjax.standout_expectation(jnp.ones(4), logits, alpha=alpha).sum())(0.0)
    assert slope == 0 or abs(slope) > 1e30  # of a step


VALUES = {
    "constant": lambda: schedules.constant(0.5),
    "linear": lambda: schedules.linear(0.0, 0.5, 4),
    "cosine": lambda: schedules.cosine(0.0, 0.5, 4),
    "early": lambda: schedules.early(0.5, 4),
    "early, decay": lambda: schedules.early(0.5, 4, decay=True),
    "late": lambda: schedules.late(0.5, 4),
    "curriculum": lambda: schedules.curriculum(0.5, 0.1),
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES.keys())
def test_schedules_are_values(make):
    schedule = make()
    for same in (make(), pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert same == schedule
        assert hash(same) == hash(schedule)
        assert same(3) == schedule(3)
    assert len({make() for make in VALUES.values()}) == len(VALUES)


def test_transformations_functions_and_results_pickle(key):
    transform, params = pickle.loads(pickle.dumps(constraints.max_norm(0.5, axis=0))), {"w": inputs((4, 3))}
    expected = constraints.max_norm(0.5, axis=0).update(params, None, params)[0]
    np.testing.assert_array_equal(transform.update(params, transform.init(params), params)[0]["w"], expected["w"])
    for function in (*(row.function for row in VARIANTS.values()), structured.spatial_dropout_2d):
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function
    x = inputs()
    for result in (
        dropjax.r_drop(lambda key: dropjax.dropout(key, x, 0.5), key),
        dropjax.token_dropout(key, x, 0.5),
        dropjax.drop_node(key, 3, jnp.arange(2), jnp.arange(2), 0.5),
        mc.classify(lambda key: dropjax.dropout(key, x, 0.5), key, 2),
        mc.regress(lambda key: dropjax.dropout(key, x, 0.5), key, 2),
    ):
        for same in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
            assert type(same) is type(result)
            for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(result), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(6))
def test_layer_drop_without_jit(seed):
    x, key = inputs(), jax.random.key(seed)
    expected = dropjax.layer_drop(key, jnp.sin, x, 0.5)
    with jax.disable_jit():
        np.testing.assert_allclose(dropjax.layer_drop(key, jnp.sin, x, 0.5), expected, rtol=1e-6)
        np.testing.assert_allclose(dropjax.layer_drop(key, jnp.sin, x, jnp.float32(0.5)), expected, rtol=1e-6)
