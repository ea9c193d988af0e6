"""Layers with parameters of their own: the functions with those parameters, and what they add to the loss."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

import dropjax
import dropjax.linen
import dropjax.nnx
from tests.test_errors import KEY
from tests.test_learned import inputs

pytestmark = pytest.mark.usefixtures("quick_compiler")
PARAMETERS = {"ConcreteDropout": "rate_logit", "VariationalGaussianDropout": "log_alpha"}
NOISES = {"VariationalDense": "log_alpha", "SparseVariationalDense": "log_sigma2"}


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS.items())
def test_learned_dropout_is_its_function(name, parameter, key):
    x = inputs()
    linen = getattr(dropjax.linen, name)(shape=(8,))
    ours = getattr(dropjax.nnx, name)(shape=(8,))
    variables = linen.init(jax.random.key(0), x, deterministic=True)
    assert jax.tree.map(jnp.shape, variables) == {"params": {parameter: (8,)}}
    value = jnp.linspace(-2, 1, 8)
    setattr(ours, parameter, nnx.Param(value))
    expected = ours._function(key, x, value)
    run = lambda value, **o: linen.apply({"params": {parameter: value}}, x, deterministic=False, rng=key, **o)  # noqa: E731
    np.testing.assert_array_equal(run(value), expected)
    np.testing.assert_array_equal(ours(x, rngs=key), expected)
    np.testing.assert_array_equal(linen.apply(variables, x, deterministic=True), x)
    assert ours(x, deterministic=True) is x
    piece = linen.apply({"params": {parameter: value}}, x[2:], deterministic=False, rng=key, start={0: 2})
    np.testing.assert_allclose(piece, expected[2:], rtol=2e-6)
    slope = jax.grad(lambda value: (ours._function(key, x, value) ** 2).sum())(value)
    np.testing.assert_allclose(jax.grad(lambda value: (run(value) ** 2).sum())(value), slope, rtol=1e-5)
    found = nnx.grad(lambda layer: (layer(x, rngs=key) ** 2).sum())(ours)
    np.testing.assert_allclose(found[parameter][...], slope, rtol=1e-5)


def test_first_values():
    for rate in (0.1, 0.5):
        layer = dropjax.nnx.ConcreteDropout(rate)
        np.testing.assert_allclose(special.expit(layer.rate_logit[...]), rate, rtol=1e-6)
        params = dropjax.linen.ConcreteDropout(rate).init(jax.random.key(0), jnp.ones(3), deterministic=True)["params"]
        np.testing.assert_array_equal(params["rate_logit"], layer.rate_logit[...])
    for rate in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"ConcreteDropout: initial_rate must be in \(0, 1\), got"):
            dropjax.nnx.ConcreteDropout(rate)
    assert dropjax.nnx.ConcreteDropout(shape=3).rate_logit.shape == (3,)  # a length is a shape
    assert dropjax.nnx.VariationalGaussianDropout(shape=3).log_alpha.shape == (3,)
    x, options = jnp.ones((2, 3)), {"deterministic": True}
    assert dropjax.linen.ConcreteDropout(shape=3).init(KEY, x, **options)["params"]["rate_logit"].shape == (3,)
    for value, kind, message in [
        (np.nan, ValueError, r"be in \(-inf, inf\), got nan"),
        ("a", TypeError, "be a number"),
    ]:
        for name, sizes in [("VariationalGaussianDropout", ()), ("VariationalDense", (3,))]:
            match = f"{name}: initial_log_alpha must {message}"
            with pytest.raises(kind, match=match):
                getattr(dropjax.nnx, name)(*sizes, *sizes, initial_log_alpha=value, rngs=nnx.Rngs(0))
            with pytest.raises(kind, match=match):
                getattr(dropjax.linen, name)(*sizes, initial_log_alpha=value).init(KEY, x, **options)
    with pytest.raises(ValueError, match=r"VariationalDense: per must be one of .*, got 'row'"):
        dropjax.nnx.VariationalDense(3, 4, per="row", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"VariationalDense: rngs must be nnx.Rngs, .* got None"):
        dropjax.nnx.VariationalDense(3, 4)


@pytest.mark.parametrize(("name", "noise"), NOISES.items())
@pytest.mark.parametrize(("per", "shape"), {"weight": (8, 5), "unit": (8, 1), "layer": ()}.items())
def test_dense_layers_are_their_functions(name, noise, per, shape, key):
    x = inputs()
    linen = getattr(dropjax.linen, name)(5, per=per, **{f"initial_{noise}": -3.0})
    ours = getattr(dropjax.nnx, name)(8, 5, per=per, rngs=nnx.Rngs(0), **{f"initial_{noise}": -3.0})
    kernel, bias = ours.kernel[...], jnp.arange(5.0)
    ours.bias = nnx.Param(bias)
    params = linen.init(jax.random.key(0), x, deterministic=True)["params"]
    assert jax.tree.map(jnp.shape, params) == {"kernel": (8, 5), noise: shape, "bias": (5,)}
    np.testing.assert_array_equal(params[noise], np.full(shape, -3, np.float32))
    variables = {"params": {**params, "kernel": kernel, "bias": bias}}
    expected = ours._function(key, x, kernel, params[noise]) + bias[None, None]
    y, changed = linen.apply(variables, x, deterministic=False, rng=key, mutable=["losses"])
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(ours(x, rngs=key), expected)
    np.testing.assert_array_equal(linen.apply(variables, x, deterministic=False, rng=key), expected)
    mean, log_alpha = kernel, params[noise]
    if name.startswith("Sparse"):
        mean, log_alpha = dropjax.sparse_kernel(kernel, log_alpha), dropjax.sparse_log_alpha(kernel, log_alpha)
        assert (mean == 0).any()
    np.testing.assert_allclose(linen.apply(variables, x, deterministic=True), x @ mean + bias[None, None], rtol=1e-6)
    np.testing.assert_allclose(ours(x, deterministic=True), x @ mean + bias[None, None], rtol=1e-6)
    kl = np.broadcast_to(dropjax.variational_dropout_kl(log_alpha), (8, 5)).sum()  # counts for each weight
    np.testing.assert_allclose(changed["losses"]["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(ours.kl(), kl, rtol=1e-5)


def test_the_divergence_in_losses_is_that_of_the_call_alone(key):
    """Not of `init`, once for a layer that is called twice, and with its gradient."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = dropjax.linen.SparseVariationalDense(8, deterministic=False)
            return layer(layer(x))

    model, x = Twice(), inputs()
    variables = model.init({"params": key, "dropout": key}, x)
    assert set(variables) == {"params"}

    def kl(params):
        _, changed = model.apply({"params": params}, x, rngs={"dropout": key}, mutable=["losses"])
        (found,) = jax.tree.leaves(changed["losses"])
        return found

    def direct(params):
        of = params["SparseVariationalDense_0"]
        return dropjax.variational_dropout_kl(dropjax.sparse_log_alpha(of["kernel"], of["log_sigma2"])).sum()

    (a, da), (b, db) = (jax.value_and_grad(of)(variables["params"]) for of in (kl, direct))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda i, j: np.testing.assert_allclose(i, j, rtol=1e-5), da, db)


@pytest.mark.parametrize("name", [*PARAMETERS, *NOISES])
def test_nnx_layers_are_modules(name):
    sizes = (8, 5) if name in NOISES else ()
    layer, x = getattr(dropjax.nnx, name)(*sizes, rngs=nnx.Rngs(0), sharded_dims={0: "a"}), inputs()
    assert layer.sharded_dims == ((0, "a"),)
    layer.sharded_dims = None
    expected = nnx.clone(layer)(x)
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(nnx.clone(layer), x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(nnx.merge(*nnx.split(layer))(x), expected)
    assert (layer(x) != layer(x)).any()
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))
    if name in PARAMETERS:  # Flax's initialisers, which a dense layer keeps as Flax's do, are not pickled
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    layer.train()
    layer.rngs = nnx.data(None)
    with pytest.raises(ValueError, match="rngs"):
        layer(x)


@pytest.mark.parametrize("name", NOISES)
def test_dense_layers_evaluate_what_they_train_on(name):
    """In evaluation and at init the checks and the precision are those of the function with noise."""
    linen, ours = getattr(dropjax.linen, name)(5), getattr(dropjax.nnx, name)(8, 5, rngs=nnx.Rngs(0))
    x = inputs()
    variables = linen.init(jax.random.key(0), x, deterministic=True)
    for run in [
        lambda x: linen.init(jax.random.key(0), x, deterministic=True),
        lambda x: linen.apply(variables, x, deterministic=True),
        lambda x: ours(x, deterministic=True),
    ]:
        for dtype in (jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64):
            with pytest.raises(TypeError, match=f"{ours._function.__name__}: x must be a .*float"):
                run(jnp.ones((2, 8), dtype))
        with pytest.raises(ValueError, match="x must have a dimension of features"):
            run(1.0)
    with pytest.raises(ValueError, match=r"kernel must be .*, got shape \(8, 5\) for \(2, 7\)"):
        ours(jnp.ones((2, 7)), deterministic=True)
    narrow, kernel = x.astype(jnp.bfloat16), ours.kernel[...] + 2.0**-12  # which bfloat16 would round away
    ours.kernel = nnx.Param(kernel)
    ours.log_sigma2 = nnx.Param(jnp.full((8, 5), -99.0))  # no weight is noise
    y = ours(narrow, deterministic=True)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, (narrow.astype(jnp.float32) @ kernel).astype(jnp.bfloat16))
    if name == "VariationalDense":  # as its docstring says
        dense = nn.Dense(5, dtype=jnp.float32)
        flax = dense.apply({"params": {"kernel": kernel, "bias": jnp.zeros(5)}}, x)
        np.testing.assert_allclose(ours(x, deterministic=True), flax, rtol=1e-5, atol=1e-6)
