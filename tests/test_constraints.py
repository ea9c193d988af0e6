"""The max-norm constraint against Keras's, against NumPy, and after any number of steps."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from dropjax.constraints import clip_norm, max_norm

NORMAL = np.random.default_rng(0).normal
FLOATS = ["float16", "bfloat16", "float32"]


def oracle(w, bound, axis):
    """The formula in NumPy, in float64."""
    w = np.asarray(w, np.float64)
    norm = np.sqrt((w**2).sum(axis, keepdims=True))
    return np.where(norm > bound, w * bound / np.where(norm == 0, 1, norm), w)


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 5), 0), ((6, 5), -1), ((3, 3, 2, 4), (0, 1, 2)), ((3, 0), 0), ((7,), 0)]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_formula(shape, axis, dtype):
    w = jnp.asarray(NORMAL(size=shape) * 2, dtype)
    y = jax.jit(lambda w: clip_norm(w, 3.0, axis=axis))(w)
    assert y.dtype == w.dtype
    expected = oracle(w, 3.0, axis)
    tolerance = float(jnp.finfo(dtype).eps) / 2 + (18 + 4) * 2.0**-24  # one rounding, after a sum of 18 in float32
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance)
    inside = expected == np.asarray(w, np.float64)
    np.testing.assert_array_equal(y[inside], w[inside])


@pytest.mark.parametrize(("shape", "axis", "bound"), [((6, 50), 0, 2.0), ((3, 3, 2, 40), (0, 1, 2), 4.0)])
def test_keras_agrees_up_to_its_epsilon(shape, axis, bound):
    """Keras multiplies by min(norm, bound) / (norm + 1e-7): what we give times norm / (norm + 1e-7)."""
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras")
    w = NORMAL(size=shape).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = np.asarray(keras.constraints.MaxNorm(bound, axis)(w), np.float64)
    norm = np.sqrt((w.astype(np.float64) ** 2).sum(axis, keepdims=True))
    assert 0 < (norm > bound).mean() < 1
    ours = np.asarray(clip_norm(w, bound, axis=axis)) * norm / (norm + 1e-7)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_float64():
    with jax.enable_x64(True):
        w = jnp.asarray(NORMAL(size=(6, 5)) * 1e200)
        y = clip_norm(w, 0.1, axis=0)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(np.linalg.norm(y, axis=0), 0.1, rtol=1e-15)


@pytest.mark.parametrize(("size", "bound"), [(3e38, 3.0), (1e30, 1e29), (1e-30, 1e-30), (6e4, 3.0)])
def test_squares_neither_overflow_nor_vanish(size, bound):
    w = jnp.full((4, 1), size, jnp.float16 if size == 6e4 else jnp.float32)
    y = np.asarray(clip_norm(w, bound, axis=0), np.float64)
    np.testing.assert_allclose(y, bound / 2, rtol=1e-3 if size == 6e4 else 1e-6)


def test_zeros_and_their_gradient():
    """At 0 the projection is the identity, and so is its derivative."""
    w = jnp.zeros((3, 2)).at[:, 1].set(jnp.array([3.0, 0.0, 4.0]))
    np.testing.assert_array_equal(clip_norm(w, 0.1, axis=0)[:, 0], np.zeros(3))
    for bound in (0.1, 5.5):
        jacobian = jax.jacobian(lambda w, bound=bound: clip_norm(w, bound, axis=0))(w)
        np.testing.assert_array_equal(jacobian[:, 0, :, 0], np.eye(3))
        assert np.isfinite(jacobian).all()
    unit = np.array([0.6, 0, 0.8])  # of w / |w| the derivative is (1 - u u^T) / |w|
    jacobian = jax.jacobian(lambda w: clip_norm(w, 0.1, axis=0))(w)[:, 1, :, 1]
    np.testing.assert_allclose(jacobian, 0.1 * (np.eye(3) - np.outer(unit, unit)) / 5, atol=1e-8)


def test_nan_and_infinity_are_seen():
    w = jnp.ones((3, 3)).at[0, 0].set(jnp.nan).at[0, 1].set(jnp.inf)
    optimizer = max_norm(1.0, axis=0)
    updates, _ = optimizer.update(jnp.zeros((3, 3)), optimizer.init(w), w)
    for y in (clip_norm(w, 1.0, axis=0), optax.apply_updates(w, updates)):
        assert np.isnan(y[:, 0]).all()
        assert np.isnan(y[0, 1])
        np.testing.assert_allclose(y[:, 2], 3**-0.5, rtol=1e-6)
    np.testing.assert_array_equal(clip_norm(w[:, 1:], jnp.inf, axis=0), w[:, 1:])


def test_a_traced_bound():
    """One program for all bounds; a bad one gives NaN."""
    w = jnp.asarray(NORMAL(size=(4, 5)), jnp.float32)
    bounds = jnp.array([0.5, 2.0, jnp.inf, 0.0, -1.0, jnp.nan])
    found = jax.vmap(lambda bound: clip_norm(w, bound, axis=0))(bounds)
    for y, bound in zip(found[:3], bounds[:3].tolist(), strict=True):
        np.testing.assert_allclose(y, oracle(w, bound, 0) if bound < np.inf else w, rtol=1e-6)
    assert np.isnan(found[3:]).all()
    assert np.isnan(jax.jit(lambda bound: clip_norm(jnp.zeros((2, 2)), bound, axis=0))(-1.0)).all()


def test_norms_hold_after_every_step():
    """Under scan, under vmap over bounds, for two kinds of kernels of all dtypes, with updates of many sizes.

    Weights stay inside, |w| <= bound, and move by at most 2 bound: a difference of such numbers that is rounded to
    the dtype of the updates, added and rounded again is off by at most (2 + 1) / 2 eps bound in norm, after
    the rounding of the bounded weights themselves, 1 / 2 eps bound, and of a sum of 20 squares in float32.
    """
    dense = {f"dense {of}": (0, (20, 7), of, of) for of in FLOATS}
    layers = {**dense, "conv": ((0, 1, 2), (3, 3, 2, 5), "bfloat16", "bfloat16")}
    layers["mixed"] = (0, (20, 7), "float16", "float32")
    params = {
        name: {"kernel": jnp.zeros(shape, of), "bias": jnp.zeros(5, of)} for name, (_, shape, of, _) in layers.items()
    }
    sizes = 10.0 ** (np.arange(25) % 5 - 2)
    updates = {
        name: {of: np.stack([NORMAL(size=leaf.shape) * size for size in sizes]) for of, leaf in layer.items()}
        for name, layer in params.items()
    }
    updates = {name: jax.tree.map(lambda u, to=layers[name][3]: jnp.asarray(u, to), of) for name, of in updates.items()}

    def kernels(axis):
        return {name: {"kernel": layers[name][0] == axis, "bias": False} for name in layers}

    def run(bound):
        chain = optax.chain(*[optax.masked(max_norm(bound, axis=axis), kernels(axis)) for axis in (0, (0, 1, 2))])

        def step(carry, given):
            params, state = carry
            given, state = chain.update(given, state, params)
            params = optax.apply_updates(params, given)
            return (params, state), (params, given)

        return jax.lax.scan(step, (params, chain.init(params)), updates)[1]

    bounds = np.array([0.05, 1.0, 30.0])
    with jax.numpy_dtype_promotion("standard"):
        every, given = jax.jit(jax.vmap(run))(jnp.asarray(bounds, jnp.float32))
    assert jax.tree.map(lambda of: of.dtype, given) == jax.tree.map(lambda of: of.dtype, updates)
    for name, (axis, _, of, _) in layers.items():
        w = np.asarray(every[name]["kernel"], np.float64)
        ratio = np.sqrt((w**2).sum(tuple(2 + a for a in np.atleast_1d(axis)))) / bounds[:, None, None]
        assert ratio.max() <= 1 + 2 * float(jnp.finfo(of).eps) + 20 * 2.0**-24, name
        assert (ratio[:, 4:].max((1, 2)) > 0.99).all(), "the bound is reached"
        assert np.abs(np.asarray(every[name]["bias"], np.float64)).max() > 100, "biases are free"


def test_updates_within_the_bound_pass_bit_for_bit():
    params, updates = (jnp.asarray(NORMAL(size=(3, 50)), jnp.float32) for _ in range(2))
    optimizer = max_norm(2.0, axis=0)
    found, _ = optimizer.update(updates, optimizer.init(params), params)
    inside = np.linalg.norm(params + updates, axis=0) <= 2
    assert 0 < inside.mean() < 1
    np.testing.assert_array_equal(found[:, inside], updates[:, inside])
    np.testing.assert_allclose(params + found, oracle(params + updates, 2.0, 0), atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_flax_models_with_kernels_picked_by_name():
    """Linen's parameters and NNX's, after a step that takes all weights far out."""

    def kernels(params):
        named = jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)
        assert sum(jax.tree.leaves(named)) == 1
        return named

    optimizer = optax.chain(optax.sgd(1.0), optax.masked(max_norm(3.0, axis=0), kernels))
    x = jnp.ones((4, 3))
    module = nn.Dense(5)
    params = module.init(jax.random.key(0), x)
    gradients = jax.grad(lambda params: -100 * module.apply(params, x).sum())(params)
    params = optax.apply_updates(params, optimizer.update(gradients, optimizer.init(params), params)[0])
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    trainer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    trainer.update(model, nnx.grad(lambda model: -100 * model(x).sum())(model))
    for kernel, bias in [params["params"].values(), (model.kernel[...], model.bias[...])]:
        kernel, bias = (kernel, bias) if kernel.ndim == 2 else (bias, kernel)
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 3, rtol=1e-6)
        np.testing.assert_array_equal(bias, np.full(5, 400))


def test_without_params_it_says_what_optax_says():
    told = []
    for transformation in (max_norm(1.0, axis=0), optax.keep_params_nonnegative()):
        with pytest.raises(ValueError, match="params") as caught:
            transformation.update({"w": jnp.ones((2, 2))}, transformation.init({"w": jnp.ones((2, 2))}), None)
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (0, ValueError, "max_value must be above 0, got 0."),
        (-1.5, ValueError, "max_value must be above 0, got -1.5."),
        (np.nan, ValueError, "max_value must be above 0, got nan."),
        (1e-40, ValueError, "max_value must be at least 1.1754943508222875e-38, the least normal number of float32"),
        (jnp.float32(-2), ValueError, "max_value must be above 0, got -2.0."),
        ("three", TypeError, "max_value must be a number or a float scalar, got 'three' (str)."),
        (True, TypeError, "max_value must be a number or a float scalar, got True (bool)."),
        (None, TypeError, "max_value must be a number or a float scalar, got None (NoneType)."),
        (np.ones(2), TypeError, "max_value must be a number or a float scalar, got float64[2]. Use jax.vmap"),
        (jnp.int32(3), TypeError, "max_value must be a number or a float scalar, got int32[]."),
    ],
    ids=str,
)
def test_bad_bounds(value, kind, message):
    with pytest.raises(kind, match=re.escape(f"max_norm: {message}")):
        max_norm(value, axis=0)
    with pytest.raises(kind, match=re.escape(f"clip_norm: {message}")):
        clip_norm(jnp.ones((2, 2)), value, axis=0)


@pytest.mark.parametrize(
    ("params", "axis", "kind", "message"),
    [
        ({"bias": jnp.ones(2)}, 0, ValueError, "axis must leave an axis of units, got 0 for ['bias'] of shape (2,)."),
        (jnp.ones((2, 3)), (0, 1), ValueError, "got (0, 1) for params of shape (2, 3). Constrain kernels only"),
        (jnp.ones((2, 3)), 2, ValueError, "axis must be in [-2, 2) for rank 2, got 2."),
        (jnp.ones((2, 3)), (0, -2), ValueError, "axis must name each dimension once, got (0, -2)."),
        (jnp.ones((2, 3)), None, TypeError, "axis must be a sequence of dimensions, got None (NoneType)."),
        (jnp.ones((2, 3), int), 0, TypeError, "x must be a float or complex array, got int32[2,3]."),
        (jnp.ones((2, 3), complex), 0, TypeError, "x must be a real float array, got complex64[2,3]."),
    ],
    ids=["bias", "all axes", "range", "twice", "None", "integers", "complex"],
)
def test_bad_parameters(params, axis, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        max_norm(1.0, axis=axis).update(params, optax.EmptyState(), params)


def test_updates_of_other_shapes_are_not_broadcast():
    message = r"max_norm: updates must have the shapes of params, got \(2, 3\) for \(1, 3\) at \['w'\]\."
    with pytest.raises(ValueError, match=message):
        max_norm(1.0, axis=0).update({"w": jnp.ones((2, 3))}, optax.EmptyState(), {"w": jnp.ones((1, 3))})
