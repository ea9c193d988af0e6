"""Standout: each element is kept with the sigmoid of its own logit; evaluation is the expectation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from scipy import special

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax.functional import adaptive
from tests import oracle
from tests.test_errors import KEY, raises

pytestmark = pytest.mark.usefixtures("quick_compiler")
RNG = np.random.default_rng(8)
X = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)
LOGITS = jnp.asarray(2 * RNG.normal(size=(8, 6)), jnp.float32)
AFFINE = {"alpha": 1.5, "beta": -0.5}


def test_matches_its_oracle(key):
    """The thresholds of NumPy's float64 and JAX's float32 differ by some 1e-7: no word of this key lies between."""
    words = oracle.words(jax.random.key_data(key), X.shape).astype(np.float64)
    threshold = 2.0**32 * special.expit(-(1.5 * np.asarray(LOGITS, np.float64) - 0.5))
    assert (np.abs(words / threshold - 1) > 1e-4).all()
    expected = np.where(words >= threshold, X, 0)
    np.testing.assert_array_equal(dropjax.standout(key, X, LOGITS, **AFFINE), expected)
    traced = jax.jit(lambda a, b: dropjax.standout(key, X, LOGITS, alpha=a, beta=b))
    np.testing.assert_array_equal(traced(1.5, -0.5), expected)
    column = jnp.full((6,), 1.5)
    np.testing.assert_array_equal(dropjax.standout(key, X, LOGITS, alpha=column, beta=jnp.float32(-0.5)), expected)


@pytest.mark.parametrize("z", [-25.0, -20.0, -3.0, -0.1, 0.0, 0.1, 3.0, 20.0, 25.0])
def test_the_number_of_words_that_keep_is_the_rounded_probability(z):
    """All words from 2^32 - t keep, and none below: t is round(p 2^32), with the float32 error of the rarer of two."""
    wanted = special.expit(z) * 2.0**32
    error = 0.5 + 2.0**32 * min(special.expit(z), special.expit(-z)) * 1e-6
    around = np.round(2.0**32 - wanted + np.array([-error, error])).astype(np.int64) + np.array([-1, 1])
    around = np.clip(around, 0, 2**32 - 1).astype(np.uint32)
    kept = adaptive._keep(jnp.asarray(around), jnp.full(2, z, jnp.float32))
    assert kept.tolist() == [around[0] == 0 and wanted >= 2**32 - 0.5, wanted >= 0.5]


def test_mean_and_variance_are_those_of_the_theory():
    """Within 6 standard errors of x p and x^2 p (1 - p), from the moments of a Bernoulli variable."""
    n, x = 20_000, jnp.array([1.0, -2.0, 0.5, 3.0, 1.0])
    logits = jnp.array([-2.0, -0.5, 0.0, 1.5, 30.0])
    keys = jax.random.split(jax.random.key(5), n)
    kept = np.asarray(jax.jit(jax.vmap(lambda key: dropjax.standout(key, x, logits, **AFFINE)))(keys)) / np.asarray(x)
    p = special.expit(1.5 * np.asarray(logits, np.float64) - 0.5)
    assert set(np.unique(kept)) == {0.0, 1.0}
    assert (np.abs(kept.mean(0) - p) <= 6 * np.sqrt(p * (1 - p) / n)).all()
    mean = dropjax.standout_expectation(x, logits, **AFFINE)
    np.testing.assert_allclose(mean, np.asarray(x) * p, rtol=1e-6)


def test_at_alpha_zero_it_is_dropout_without_scale(key):
    y = dropjax.standout(key, X, LOGITS, alpha=0.0, beta=0.0)
    np.testing.assert_array_equal(y, jnp.where(dropjax.keep_mask(key, X.shape, 0.5), X, 0))


def test_the_mask_is_a_constant_to_the_derivative(key):
    def drop(x, logits, alpha, beta):
        return dropjax.standout(key, x, logits, alpha=alpha, beta=beta)

    arguments = (X, LOGITS, jnp.float32(1.5), jnp.float32(-0.5))
    mask = drop(jnp.ones_like(X), *arguments[1:])
    gradients = jax.grad(lambda *a: drop(*a).sum(), (0, 1, 2, 3))(*arguments)
    np.testing.assert_array_equal(gradients[0], mask)
    assert all((g == 0).all() for g in gradients[1:])
    _, tangent = jax.jvp(drop, arguments, arguments)
    np.testing.assert_array_equal(tangent, mask * X)
    again = jax.grad(jax.jit(jax.checkpoint(lambda *a: drop(*a).sum())))(*arguments)
    np.testing.assert_array_equal(again, mask)
    _, backward = jax.vjp(lambda x: drop(x, *arguments[1:]), X)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(backward) if hasattr(leaf, "nbytes")) == X.size


def test_gradient_of_the_expectation():
    def loss(*a):
        return dropjax.standout_expectation(a[0], a[1], alpha=a[2], beta=a[3]).sum()

    found = jax.grad(loss, (0, 1, 2, 3))(X, LOGITS, 1.5, -0.5)
    x, logits = np.asarray(X, np.float64), np.asarray(LOGITS, np.float64)
    p = special.expit(1.5 * logits - 0.5)
    slope = x * p * (1 - p)
    for f, e in zip(found, [p, 1.5 * slope, (slope * logits).sum(), slope.sum()], strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6)


def test_limits_and_bad_logits(key):
    logits = jnp.array([-jnp.inf, jnp.inf, jnp.nan, -1e30, 1e30, jnp.nan])
    x = jnp.array([jnp.inf, 2.0, 3.0, jnp.inf, 5.0, 0.0])
    np.testing.assert_array_equal(dropjax.standout(key, x, logits), [0, 2, np.nan, 0, 5, np.nan])
    finite = jnp.where(jnp.isnan(logits), 0, logits)
    assert jnp.isfinite(jax.grad(lambda x: dropjax.standout(key, x, finite).sum())(x)).all()
    gradient = jax.grad(lambda z: dropjax.standout_expectation(jnp.ones(6), z).sum())(jnp.clip(finite, -1e30, 1e30))
    assert jnp.isfinite(gradient).all()


def test_vmap_pieces_and_shards(key):
    whole = dropjax.standout(key, X, LOGITS)
    keys = jax.random.split(key, 3)
    many = jax.vmap(lambda k, x: dropjax.standout(k, x, LOGITS), (0, None))(keys, X)
    for i in range(3):
        np.testing.assert_array_equal(many[i], dropjax.standout(keys[i], X, LOGITS))
    second = dropjax.standout(key, X[5:], LOGITS[5:], start={0: 5})
    np.testing.assert_array_equal(second, whole[5:])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def drop(x, logits, dims={0: "data"}):  # noqa: B006
        return dropjax.standout(key, x, logits, sharded_dims=dims)

    cut = {"mesh": mesh, "in_specs": P("data"), "out_specs": P("data")}
    np.testing.assert_array_equal(jax.jit(jax.shard_map(drop, **cut))(X, LOGITS), whole)
    with pytest.raises(ValueError, match="standout: x must be accounted for over mesh axis 'data'"):
        jax.shard_map(lambda x, logits: drop(x, logits, None), **cut)(X, LOGITS)


def test_dtypes_and_empty_arrays(key):
    whole = dropjax.standout(key, X, LOGITS)
    for dtype in [jnp.bfloat16, jnp.float16, jnp.complex64]:
        y = dropjax.standout(key, X.astype(dtype), LOGITS)
        assert y.dtype == dropjax.standout_expectation(X.astype(dtype), LOGITS).dtype == dtype
        np.testing.assert_array_equal(y, jnp.where(whole == 0, 0, X).astype(dtype))
    with jax.enable_x64(True):
        x, logits = np.asarray(X, np.float64), np.asarray(LOGITS, np.float64)
        np.testing.assert_array_equal(dropjax.standout(key, x, logits), np.asarray(whole, np.float64))
        mean = dropjax.standout_expectation(x, logits, **AFFINE)
        assert mean.dtype == jnp.float64
        np.testing.assert_allclose(mean, x * special.expit(1.5 * logits - 0.5), rtol=1e-14)
    for shape in [(0,), (2, 0, 3)]:
        assert dropjax.standout(key, jnp.ones(shape), 0.0).shape == shape
    assert dropjax.standout(key, 2.0, 99.0) == 2


@pytest.mark.parametrize("function", [lambda *a, **k: dropjax.standout(KEY, *a, **k), dropjax.standout_expectation])
def test_errors(function):
    raises(TypeError, "x must be a float or complex array, got int32[3].", function, jnp.arange(3), 0.0)
    raises(TypeError, "logits must be a number or a float array, got bool[8,6].", function, X, X > 0)
    raises(TypeError, "logits must be a number or a float array, got int32[8,6].", function, X, jnp.ones((8, 6), int))
    raises(TypeError, "alpha must be a number or a float array, got None (NoneType).", function, X, X, alpha=None)
    raises(TypeError, "beta must be a number or a float array, got True (bool).", function, X, X, beta=True)
    for option in ("alpha", "beta"):
        raises(ValueError, f"{option} must be in (-inf, inf), got nan.", function, X, X, **{option: np.nan})
        raises(
            ValueError, f"{option} must be in (-inf, inf), got inf.", function, X, X, **{option: jnp.float32(np.inf)}
        )
    raises(ValueError, "logits must broadcast against the shape (8, 6) of x, got shape (5,).", function, X, np.ones(5))
    raises(ValueError, "beta must broadcast against the shape (6,) of x", function, X[0], 0.0, beta=X)


def test_layers(key):
    expected = dropjax.standout(key, X, LOGITS, **AFFINE)
    one, two = dropjax.linen.Standout(**AFFINE), dropjax.nnx.Standout(**AFFINE)
    for found in [one.apply({}, X, LOGITS, False, key), two(X, LOGITS, rngs=key)]:
        np.testing.assert_array_equal(found, expected)
    for found in [
        one.apply({}, X[5:], LOGITS[5:], False, key, start={0: 5}),
        two(X[5:], LOGITS[5:], rngs=key, start={0: 5}),
    ]:
        np.testing.assert_array_equal(found, expected[5:])
    mean = dropjax.standout_expectation(X, LOGITS, **AFFINE)
    for found in [one.apply({}, X, LOGITS, True), two(X, LOGITS, deterministic=True)]:
        np.testing.assert_array_equal(found, mean)
    model = dropjax.nnx.Standout(0.0, rngs=nnx.Rngs(0))
    assert {*np.unique(model(jnp.ones(64), 0.0))} == {0, 1}  # a logit or an alpha of 0 is no rate of 0
    np.testing.assert_array_equal(nnx.view(model, deterministic=True)(jnp.ones(3), 0.0), [0.5] * 3)
    drawn = dropjax.linen.Standout(0.0).apply({}, jnp.ones(64), 0, deterministic=False, rngs={"dropout": key})
    assert {*np.unique(drawn)} == {0, 1}
    assert hash(one) == hash(dropjax.linen.Standout(**AFFINE))
