"""What does not depend on the key is computed once: read in the traced program, and gradients are those of a loop."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dropjax
from dropjax import mc
from dropjax.mc import hoisting

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32)
T = 7


def products(program, times=1):
    """How often products run, in a traced program: those in a scan as often as it loops."""
    count = 0
    for equation in program.eqns:
        count += times * (equation.primitive.name in ("dot_general", "conv_general_dilated"))
        for body in hoisting.bodies(equation):
            count += products(body, times * equation.params.get("length", 1))
    return count


def of_sample(fn, chunk_size, key):
    return products(jax.make_jaxpr(lambda key: mc.sample(fn, key, T, chunk_size=chunk_size))(key).jaxpr)


@jax.custom_jvp
def with_jvp(x, noise):
    return jnp.sin(x @ W) + noise


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), 5 * tangents[0] + tangents[1]))


@jax.custom_vjp
def with_vjp(x, key):
    return jnp.sin(x @ W) * jax.random.normal(key, x.shape)


with_vjp.defvjp(lambda x, key: (with_vjp(x, key), x), lambda x, g: (7 * g * x, None))


def drop(key, x):
    return dropjax.dropout(key, x, 0.5)


BACKBONES = {
    "plain": lambda key, x: drop(key, jax.nn.relu(x @ W)),
    "jit": jax.jit(lambda key, x: drop(key, jax.nn.relu(x @ W))),
    "nested jit": jax.jit(lambda key, x: jax.jit(lambda x: drop(key, jnp.tanh(x @ W)))(x)),
    "remat": jax.checkpoint(lambda key, x: drop(key, jnp.tanh(x @ W))),
    "custom_jvp": lambda key, x: with_jvp(x, jax.random.normal(key, x.shape)),
    "custom_vjp": lambda key, x: with_vjp(x, key),
    "scan": lambda key, x: drop(key, lax.scan(lambda x, _: (jnp.tanh(x @ W), None), x, None, length=1)[0]),
    "while": lambda key, x: drop(key, lax.fori_loop(0, 1, lambda _, x: jnp.tanh(x @ W), x)),
    "cond": lambda key, x: drop(key, lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ W), lambda x: x, x)),
}
backbones = pytest.mark.parametrize("name", BACKBONES)


@backbones
def test_the_backbone_is_computed_once_and_the_head_for_each_sample(key, name):
    def fn(key, x=X):
        return BACKBONES[name](key, x) @ W[:, :2]

    # in chunks of 3: a first one of 1 outside the loop, then 2 in it, each one batched product
    assert of_sample(fn, None, key) == 2
    assert of_sample(fn, 3, key) == 1 + 1 + 2
    explained = mc.explain(fn, key)
    assert explained.shared_flops >= 2 * 6 * 4 * 4
    assert 2 * 6 * 4 * 2 <= explained.sampled_flops <= 2 * 6 * 4 * 2 + 6000
    assert str(explained).splitlines()[-1].endswith("passes.")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nested jit", "remat", "custom_jvp", "custom_vjp", "scan"])
def test_gradients_are_those_of_a_loop(key, name):
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(3, 6, 2)), jnp.float32)

    def fn(key, x, w):
        return BACKBONES[name](key, x * 2) @ w

    @jax.jit
    def both(x, w):
        def ours(x, w):
            return (mc.sample(lambda key: fn(key, x, w), key, 3, chunk_size=2) * weights).sum()

        def loop(x, w):
            return sum((fn(jax.random.fold_in(key, t), x, w) * weights[t]).sum() for t in range(3))

        return [jax.value_and_grad(f, (0, 1))(x, w) for f in (ours, loop)]

    ours, loop = both(X, W[:, :2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, loop)


@jax.custom_vjp
def partly(x, key):
    return drop(key, jnp.sin(x)), jnp.cos(x), 1.0


def backward_of_partly(saved, g):
    x, key = saved
    return drop(key, g[0]) * jnp.cos(x) - g[1] * jnp.sin(x), None


partly.defvjp(lambda x, key: (partly(x, key), (x, key)), backward_of_partly)


def test_gradients_of_results_that_do_not_depend_on_the_key(key):
    """A true rule for several results, some shared: of T samples that sum is the gradient of cos, not T times it."""
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(3, 6, 4)), jnp.float32)

    @jax.jit
    def both(x):
        def ours(x):
            noisy, shared, _ = mc.sample(lambda key: partly(x, key), key, 3, chunk_size=2)
            return ((noisy + shared) * weights).sum()

        def loop(x):
            pairs = [partly(x, jax.random.fold_in(key, t))[:2] for t in range(3)]
            return sum(((noisy + shared) * weights[t]).sum() for t, (noisy, shared) in enumerate(pairs))

        return jax.grad(ours)(x), jax.grad(loop)(x)

    ours, loop = both(X)
    np.testing.assert_allclose(ours, loop, rtol=1e-5, atol=1e-5)


def test_what_the_function_closes_over_is_read_at_each_call(key):
    """One function called twice: what it read the first time has changed, as a model under training does."""
    state = {"scale": jnp.ones(())}

    def fn(key):
        return drop(key, X * state["scale"])

    before = mc.sample(fn, key, 2)
    state["scale"] = jnp.full((), 3.0)
    np.testing.assert_allclose(mc.sample(fn, key, 2), 3 * before, rtol=1e-6)


def test_forward_mode_and_vmap_go_through(key):
    def objective(x):
        return mc.sample(lambda key: with_jvp(x * 2, jax.random.normal(key, x.shape)), key, 3, chunk_size=2).sum()

    _, along = jax.jvp(objective, (X,), (jnp.ones_like(X),))
    np.testing.assert_allclose(along, 3 * 5 * 2 * X.size, rtol=1e-5)
    xs = jnp.stack([X, -X])
    each = jax.jit(jax.vmap(lambda x: mc.sample(lambda key: drop(key, jnp.tanh(x @ W)), key, 3)))(xs)
    one = mc.sample(lambda key: drop(key, jnp.tanh(-X @ W)), key, 3)
    np.testing.assert_allclose(each[1], one, rtol=1e-6)


def test_results_of_every_kind(key):
    """Results that do not depend on the key are repeated; keys, integers and constants come out as they are."""

    def fn(key):
        first, second = jax.random.split(key)
        empty = jax.random.normal(first, (0, 2))
        number = jax.random.randint(first, (2,), 0, 9)
        return {"shared": X @ W, "int": number, "key": second, "one": 1, "none": None, "empty": empty}

    loop = [fn(jax.random.fold_in(key, t)) for t in range(T)]
    for chunk_size in [None, 3]:
        out = mc.sample(fn, key, T, chunk_size=chunk_size)
        np.testing.assert_allclose(out["shared"], jnp.stack([X @ W] * T), rtol=1e-6)
        np.testing.assert_array_equal(out["int"], jnp.stack([of["int"] for of in loop]))
        data = [jax.random.key_data(of["key"]) for of in loop]
        np.testing.assert_array_equal(jax.random.key_data(out["key"]), jnp.stack(data))
        np.testing.assert_array_equal(out["one"], np.ones(T))
        assert out["none"] is None
        assert out["empty"].shape == (T, 0, 2)


def test_loops_with_keys_inside(key):
    def fn(key):
        def body(carry, key):
            return drop(key, carry @ W), carry.sum()

        def grow(state):
            return state[0] + 1, drop(jax.random.fold_in(key, state[0]), state[1] + 1)

        x, sums = lax.scan(body, X, jax.random.split(key, 3))
        _, y = lax.while_loop(lambda state: state[0] < 3, grow, (0, x))
        return lax.cond(jax.random.bernoulli(key), lambda: y, lambda: -y), sums

    samples = jax.jit(lambda key: mc.sample(fn, key, 5, chunk_size=2))(key)
    loop = jax.tree.map(lambda *of: jnp.stack(of), *[fn(jax.random.fold_in(key, t)) for t in range(5)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), samples, loop)


def test_references_belong_to_one_sample(key):
    """One made of what is shared, then written with what is drawn."""

    def fn(key):
        reference = jax.new_ref(jnp.tanh(X))
        before = reference[...].sum()
        reference[...] = before + jax.random.normal(key, X.shape)
        return before, reference[...]

    samples = jax.jit(lambda key: mc.sample(fn, key, 5, chunk_size=2))(key)
    loop = jax.tree.map(lambda *of: jnp.stack(of), *[fn(jax.random.fold_in(key, t)) for t in range(5)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), samples, loop)


def test_samples_of_samples(key):
    def inner(key):
        return mc.sample(lambda key: drop(key, jnp.tanh(X @ W)), key, 3, chunk_size=2).mean(0)

    samples = jax.jit(lambda key: mc.sample(inner, key, 4, chunk_size=3))(key)
    np.testing.assert_allclose(samples[2], inner(jax.random.fold_in(key, 2)), rtol=1e-5)
    assert of_sample(inner, 3, key) == 1


def test_effects_are_neither_doubled_nor_lost(key, capfd):
    """What prints no key prints once; what prints a sample, once a sample."""

    def fn(key):
        jax.debug.print("shared {}", X.sum())
        y = drop(key, X)
        jax.debug.print("sampled {}", y.sum())
        return y

    jax.block_until_ready(jax.jit(lambda key: mc.sample(fn, key, T, chunk_size=3))(key))
    jax.effects_barrier()
    lines = collections.Counter(line.split()[0] for line in capfd.readouterr().out.splitlines())
    assert lines == {"shared": 1, "sampled": T}


def test_what_opening_would_change_is_one(key):
    """A jit with shardings or donated arguments is not opened."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    inner = jax.jit(lambda key, x: drop(key, x @ W), in_shardings=(None, cut))
    program, _, _ = hoisting.part(lambda key: inner(key, X), key)
    assert [step.body for step in program.sampled] == [None]
    samples = jax.jit(lambda key: mc.sample(lambda key: inner(key, X), key, 3))(key)
    np.testing.assert_allclose(samples[1], drop(jax.random.fold_in(key, 1), X @ W), rtol=1e-6)


def test_named_scopes_stay(key):
    def fn(key):
        with jax.named_scope("block"):
            return jax.jit(lambda key: drop(key, jnp.tanh(X @ W)))(key)

    lowered = jax.jit(lambda key: mc.sample(fn, key, 3)).lower(key).as_text(debug_info=True)
    assert any("block" in line and "tanh" in line for line in lowered.splitlines())


def test_flops_of_known_programs(key):
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

    def fn(key):
        convolved = lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        looped, _ = lax.scan(lambda x, _: (x @ W, None), X, None, length=10)
        branched = lax.cond(X[0, 0] > 0, lambda: X @ W, lambda: X)
        return convolved, looped, branched, jax.random.bits(key, ())

    convolution, scan, cond = 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3), 10 * 2 * 6 * 4 * 4, 2 * 6 * 4 * 4
    assert mc.explain(fn, key).shared_flops == pytest.approx(convolution + scan + cond, abs=5)
    assert mc.explain(lambda key: X @ W, key).share == 1
    with pytest.raises(TypeError, match="explain: fn must be a function of a key"):
        mc.explain(X, key)
