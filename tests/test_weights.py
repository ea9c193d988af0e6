"""Dropout of weights: by name, the same at all times, with what is stored left alone."""

import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dropjax
import dropjax.linen
import dropjax.nnx
from tests import oracle
from tests.test_errors import KEY, raises


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SEQUENCE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
HIDDEN = "h?/kernel"


def params():
    return {
        "cell": {"hf": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "if": {"kernel": jnp.ones((3, 4))}},
        "out": [{"kernel": jnp.ones((4, 4))}, {"kernel": jnp.ones((4, 4))}],
    }


def words_of(path):
    """The key of a parameter, from what its docstring says, in Python integers."""
    digest = hashlib.sha256(path.encode()).digest()
    counter = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
    return oracle.threefry2x32([int(k) for k in jax.random.key_data(KEY)], counter)


def test_each_parameter_has_a_mask_by_its_path():
    dropped = dropjax.weight_drop(KEY, params(), 0.5, names=("hf/kernel", "out/*/kernel"))
    for path, found in [
        ("cell/hf/kernel", dropped["cell"]["hf"]["kernel"]),
        ("out/0/kernel", dropped["out"][0]["kernel"]),
        ("out/1/kernel", dropped["out"][1]["kernel"]),
    ]:
        np.testing.assert_array_equal(found, np.where(oracle.keep(words_of(path), (4, 4), 0.5), 2, 0))
    np.testing.assert_array_equal(dropped["cell"]["hf"]["bias"], jnp.ones(4))
    np.testing.assert_array_equal(dropped["cell"]["if"]["kernel"], jnp.ones((3, 4)))


def test_a_mask_does_not_depend_on_what_else_there_is():
    whole = dropjax.weight_drop(KEY, params(), 0.5, names="kernel")
    alone = dropjax.weight_drop(KEY, {"cell": {"hf": params()["cell"]["hf"]}}, 0.5, names=lambda p: p.endswith("nel"))
    np.testing.assert_array_equal(alone["cell"]["hf"]["kernel"], whole["cell"]["hf"]["kernel"])
    state = nnx.State({"cell": {"hf": {"kernel": nnx.Param(jnp.ones((4, 4)))}}})
    of_nnx = dropjax.weight_drop(KEY, state, 0.5, names="hf/kernel")["cell"]["hf"]["kernel"][...]
    np.testing.assert_array_equal(of_nnx, whole["cell"]["hf"]["kernel"])


def test_names_are_whole_ends_of_paths():
    dropped = dropjax.weight_drop(KEY, {"ah": jnp.ones(64), "b": {"h": jnp.ones(64)}}, 0.5, names="h")
    assert (dropped["ah"] == 1).all()
    assert (dropped["b"]["h"] != 1).all()
    dropped = dropjax.weight_drop(KEY, {"w[0]": jnp.ones(64), "w0": jnp.ones(64)}, 0.5, names="w[0]")
    assert (dropped["w0"] == 1).all()  # brackets are characters like others
    assert (dropped["w[0]"] != 1).all()


def test_gradients_traced_rates_and_pieces_of_kernels():
    def run(params, rate):
        return dropjax.weight_drop(KEY, params, rate, names="hf/kernel")["cell"]["hf"]["kernel"]

    kernel = run(params(), 0.5)
    step = jax.jit(jax.value_and_grad(lambda params, rate: run(params, rate).sum()))
    value, slope = step(params(), jnp.float32(0.5))
    assert value == kernel.sum()
    np.testing.assert_array_equal(slope["cell"]["hf"]["kernel"], kernel)  # the mask over q
    assert (slope["cell"]["hf"]["bias"] == 0).all()
    assert jnp.isnan(step(params(), jnp.float32(np.nan))[0])
    spec = jax.sharding.PartitionSpec(None, "model")
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    for cut in [{1: "model"}, lambda path: {1: "model"} if path == "cell/hf/kernel" else None]:
        piece = jax.shard_map(
            lambda k: dropjax.weight_drop(KEY, {"cell": {"hf": {"kernel": k}}}, 0.5, names="kernel", sharded_dims=cut),  # noqa: B023
            mesh=mesh, in_specs=spec, out_specs=spec,
        )  # fmt: skip
        np.testing.assert_array_equal(jax.jit(piece)(jnp.ones((4, 4)))["cell"]["hf"]["kernel"], kernel)


def test_errors():
    drop = dropjax.weight_drop
    message = (
        "weight_drop: names must each be the end of the path of a parameter, got 'hg/kernel' (str), which none has. "
        "There are: cell/hf/bias, cell/hf/kernel, cell/if/kernel, out/0/kernel, out/1/kernel."
    )
    raises(ValueError, message, drop, KEY, params(), 0.5, names=("hf/kernel", "hg/kernel"))
    raises(ValueError, "There are: no parameters.", drop, KEY, {}, 0.5, names="kernel")
    raises(ValueError, "names must each be the end of", drop, KEY, params(), 0.5, names=lambda path: False)
    same = {"a/b": jnp.ones(3), "a": {"b": jnp.ones(3), "c": jnp.ones(3)}}
    raises(ValueError, "params must have a path of its own for each named parameter, got 'a/b' twice", drop, KEY, same,
           0.5, names="b")  # fmt: skip
    assert drop(KEY, same, 1.0, names="c")["a/b"].tolist() == [1, 1, 1]
    for names in [(), 3, (3,), None]:
        raises(TypeError, "names must be one or several ends of paths, or", drop, KEY, params(), 0.5, names=names)
    raises(TypeError, "of 'a', x must be a float or complex", drop, KEY, {"a": jnp.arange(3)}, 0.5, names="a")
    raises(ValueError, "of 'a', rate must be in [0, 1], got 1.5.", drop, KEY, {"a": jnp.ones(3)}, 1.5, names="a")


@pytest.mark.usefixtures("standard_promotion")
def test_linen_wrapper_drops_for_the_whole_sequence(key):
    rnn = nn.RNN(nn.OptimizedLSTMCell(4))
    layer = dropjax.linen.WeightDrop(rnn, 0.5, names=HIDDEN, deterministic=False)
    variables = layer.init(key, SEQUENCE)
    raw = variables["params"]["module"]
    run = jax.jit(lambda v: layer.apply(v, SEQUENCE, rng=key))
    expected = jax.jit(lambda v: rnn.apply({"params": dropjax.weight_drop(key, v, 0.5, names=HIDDEN)}, SEQUENCE))
    np.testing.assert_allclose(run(variables), expected(raw), rtol=1e-6, atol=1e-6)
    plain = rnn.apply({"params": raw}, SEQUENCE)
    np.testing.assert_allclose(layer.clone(deterministic=True).apply(variables, SEQUENCE), plain, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run(variables)[:, 0], plain[:, 0], rtol=1e-5, atol=1e-6)  # before anything recurs
    assert (jnp.abs(run(variables)[:, 1:] - plain[:, 1:]) > 1e-4).any((0, 2)).all()
    slope = jax.jit(jax.grad(lambda v: run(v).sum()))(variables)["params"]["module"]["cell"]["hf"]["kernel"]
    kept = dropjax.weight_drop(key, raw, 0.5, names=HIDDEN)["cell"]["hf"]["kernel"] != 0
    np.testing.assert_array_equal(slope != 0, kept)
    with pytest.raises(ValueError, match=r"which none has\. There are: cell/hf/bias"):
        layer.clone(names="no").apply(variables, SEQUENCE, rng=key)
    with pytest.raises(ValueError, match=r"names must each be the end .*'no'"):  # also before anything is dropped
        jax.eval_shape(layer.clone(names="no", deterministic=True).init, key, SEQUENCE)
    assert layer.apply(variables, SEQUENCE, rngs={"dropout": key}).shape == plain.shape
    assert isinstance(hash(layer), int)


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_wrapper_leaves_what_is_stored(key):
    rnn = nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0)))
    layer = dropjax.nnx.WeightDrop(rnn, 0.5, names="dense_h/kernel")
    stored = rnn.cell.dense_h.kernel[...]
    run = nnx.jit(lambda layer, key: layer(SEQUENCE, rngs=key))
    found, plain = run(layer, key), rnn(SEQUENCE)
    np.testing.assert_array_equal(rnn.cell.dense_h.kernel[...], stored)
    np.testing.assert_allclose(found[:, 0], plain[:, 0], rtol=1e-5, atol=1e-6)
    other = nnx.clone(rnn)
    dropped = dropjax.weight_drop(key, nnx.state(rnn, nnx.Param), 0.5, names="dense_h/kernel")
    nnx.update(other, dropped)
    np.testing.assert_allclose(found, other(SEQUENCE), rtol=1e-6, atol=1e-6)
    slope = nnx.jit(nnx.grad(lambda layer: layer(SEQUENCE, rngs=key).sum()))(layer)["module"]["cell"]["dense_h"][
        "kernel"
    ][...]
    np.testing.assert_array_equal(slope != 0, dropped["cell"]["dense_h"]["kernel"][...] != 0)
    layer.eval()
    np.testing.assert_allclose(layer(SEQUENCE), plain, rtol=1e-6)
    with pytest.raises(ValueError, match=r"names must each be the end .*'no'"):
        dropjax.nnx.WeightDrop(rnn, 0.5, names="no")


def test_nnx_wrapper_keeps_what_the_module_writes():
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer = dropjax.nnx.WeightDrop(norm, 0.5, names="scale", rngs=nnx.Rngs(1))
    layer(SEQUENCE)
    still = dropjax.nnx.WeightDrop(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), 0.5, names="kernel")
    plain = jax.jit(lambda key: still(SEQUENCE, rngs=key))(KEY)  # what writes nothing runs under plain jit
    np.testing.assert_allclose(plain, still(SEQUENCE, rngs=KEY), rtol=1e-6)
    np.testing.assert_allclose(norm.mean[...], 0.01 * SEQUENCE.mean((0, 1)), rtol=1e-4, atol=1e-6)
    assert (norm.scale[...] == 1).all()


def test_drop_connect_dense_is_dense_with_a_dropped_kernel(key):
    x = SEQUENCE
    layer = dropjax.linen.DropConnectDense(4, 0.5, bias_init=nn.initializers.ones)
    variables = layer.init(key, x, deterministic=True)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    plain = nn.Dense(4, bias_init=nn.initializers.ones)
    jax.tree.map(np.testing.assert_array_equal, plain.init(key, x), variables)
    np.testing.assert_allclose(layer.apply(variables, x, deterministic=True), plain.apply(variables, x), rtol=1e-6)
    expected = x @ dropjax.drop_connect(key, kernel, 0.5) + bias[None, None]
    np.testing.assert_allclose(layer.apply(variables, x, deterministic=False, rng=key), expected, rtol=1e-6)
    ours = dropjax.nnx.DropConnectDense(3, 4, 0.5, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    assert ours(x).dtype == jnp.bfloat16
    ours = dropjax.nnx.DropConnectDense(3, 4, 0.5, rngs=nnx.Rngs(0))
    expected = x @ dropjax.drop_connect(key, ours.kernel[...], 0.5)
    np.testing.assert_allclose(ours(x, rngs=key), expected, rtol=1e-6)
    ours.eval()
    np.testing.assert_allclose(ours(x), nnx.Linear(3, 4, rngs=nnx.Rngs(0))(x), rtol=1e-6)


def test_drop_connect_has_the_moments_of_the_paper(key):
    """Units of a kernel W: mean x W and variance (x^2)(W^2) r / q; 6 standard errors of 20,000 draws, the variance's
    from kurtosis at most that of a single weight, (1 - 3 r q) / (r q) = 1 for r = 1/2."""
    n, x, w = 20_000, np.array([[1.0, -2.0, 3.0]], np.float32), np.array([[1.0], [2.0], [0.5]], np.float32)
    keys = jax.random.split(key, n)
    y = np.asarray(jax.jit(jax.vmap(lambda key: x @ dropjax.drop_connect(key, w, 0.5)))(keys), np.float64).ravel()
    variance = (x**2 @ w**2).item()
    assert abs(y.mean() - (x @ w).item()) < 6 * np.sqrt(variance / n)
    assert abs(y.var() - variance) < 6 * np.sqrt(2 / n) * variance
