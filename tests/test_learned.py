"""Learned rates: against NumPy formulas, quadrature, and an optimum that is known."""

import itertools

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import integrate, optimize, special, stats

import dropjax
from tests import oracle

pytestmark = pytest.mark.usefixtures("quick_compiler")
KERNEL = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
CASES = {  # the function of key, x and what is learned; a value of that
    "concrete_dropout": (dropjax.concrete_dropout, -1.0),
    "variational_gaussian_dropout": (dropjax.variational_gaussian_dropout, -1.0),
    "local_reparametrization": (dropjax.local_reparametrization, 0.5),
    "variational_dense": (lambda key, x, p, **o: dropjax.variational_dense(key, x, as_x(KERNEL, x), p, **o), -1.0),
    "sparse_variational_dense": (
        lambda key, x, p, **o: dropjax.sparse_variational_dense(key, x, as_x(KERNEL, x), p, **o),
        -2.0,
    ),
}
every = pytest.mark.parametrize("name", CASES)
three = pytest.mark.parametrize("name", [list(CASES)[i] for i in (0, 2, 4)])  # the others share their formulas
elementwise = pytest.mark.parametrize("name", list(CASES)[:3])


def as_x(kernel, x):
    return jnp.asarray(kernel).astype(x.dtype)


def inputs(shape=(6, 4, 8), dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(3).normal(size=shape) + 2).astype(dtype)


def uniform(key, shape, shared=()):
    """Midpoints of 2^24 equal intervals, in float64."""
    return ((oracle.words(jax.random.key_data(key), shape, shared) >> 8).astype(np.float64) + 0.5) / 2**24


def factor(u, logit, temperature):
    """(1 - z) / (1 - p) and its derivative by the logit, as the paper writes z."""
    p = special.expit(logit)
    z = special.expit((np.log(p) - np.log(1 - p) + np.log(u) - np.log(1 - u)) / temperature)
    return (1 - z) / (1 - p), (1 - z) / (1 - p) * (p - z / temperature)


def quadrature(function):
    """E[function(u)] for u uniform: the trapezoid rule in logit u, whose error falls as exp(-2 pi^2 0.1 / 0.01)."""
    u = special.expit(np.linspace(-36, 36, 7201))
    return (function(u) * u * (1 - u)).sum() * 0.01


# --- values ---


@pytest.mark.parametrize("temperature", [0.1, 0.6, 1.0])
def test_concrete_dropout_matches_its_oracle(key, temperature):
    x, shape = inputs((3, 4, 5)), (3, 4, 5)
    logits = np.array([-4, -1, 0, 1, 4], np.float32)
    value, slope = factor(uniform(key, shape), logits.astype(np.float64), temperature)
    y, tangent = jax.jvp(
        lambda logit: dropjax.concrete_dropout(key, x, logit, temperature=temperature),
        (jnp.asarray(logits),),
        (jnp.ones(5),),
    )
    # an error of 2^-24 of the logits of z, up to 21 / temperature, is one of 21 / temperature 2^-24 of the result
    bound = {"rtol": 1e-6 + 2 * 21 / temperature * 2.0**-24, "atol": 1e-6}
    np.testing.assert_allclose(y, x * value, **bound)
    np.testing.assert_allclose(tangent, x * slope, rtol=bound["rtol"], atol=1e-5 / temperature)
    shared = dropjax.concrete_dropout(key, x, -1.0, temperature=temperature, broadcast_dims=(1,))
    np.testing.assert_allclose(shared, x * factor(uniform(key, shape, (1,)), -1.0, temperature)[0], **bound)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_moments_of_concrete_dropout_are_those_of_quadrature(key, rate):
    """Within 6 standard errors. At a temperature of 0.1 P(z > 1/2) is the rate, and E[y] close to x."""
    n, logit = 200_000, float(special.logit(rate))
    y = np.asarray(dropjax.concrete_dropout(key, jnp.ones(n), logit), np.float64)
    first, second, fourth = (quadrature(lambda u, k=k: factor(u, logit, 0.1)[0] ** k) for k in (1, 2, 4))
    assert abs(y.mean() - first) < 6 * np.sqrt((second - first**2) / n)
    assert abs((y**2).mean() - second) < 6 * np.sqrt((fourth - second**2) / n)
    assert abs((y * (1 - rate) < 0.5).mean() - rate) < 6 * np.sqrt(rate * (1 - rate) / n)
    assert abs(first - 1) < 0.012  # 0.99869, 1 and 1.01183


def test_concrete_dropout_finds_the_rate_that_is_best(key):
    """One weight w = 1 on an input of 1: the loss is a / 2 E[(m - 1)^2] + KL, m the noise.

    With n draws that stay, its minimum lies around that of the expectation, which quadrature knows, with a
    standard error of sd(slope) / (curvature sqrt(n)).
    """
    n, a, length = 30_000, 0.5, 0.3

    def slope(logit):  # of the loss of each u
        p = special.expit(logit)
        rest = length**2 / 2 * np.exp(logit) + logit * p * (1 - p)  # of KL: H' = -logit p (1 - p)

        def of(u):
            m, dm = factor(u, logit, 0.1)
            return a * (m - 1) * dm + rest

        return of

    best = optimize.brentq(lambda logit: quadrature(slope(logit)), -4, 2)
    curvature = (quadrature(slope(best + 1e-4)) - quadrature(slope(best - 1e-4))) / 2e-4
    error = np.sqrt(quadrature(lambda u: slope(best)(u) ** 2) / n) / curvature

    def loss(logit):
        noise = dropjax.concrete_dropout(key, jnp.ones(n), logit)
        kl = dropjax.concrete_dropout_kl(logit, jnp.ones((1, 1)), length_scale=length)
        return a / 2 * ((noise - 1) ** 2).mean() + kl

    def descend(logit, _):
        value = jax.grad(loss)(logit)
        return logit - 0.7 / curvature.astype(np.float32) * value, value

    for first in (-3.0, 1.0):
        found, slopes = jax.jit(lambda first: jax.lax.scan(descend, first, length=40))(jnp.float32(first))
        assert abs(slopes[-1]) < 1e-3 * abs(slopes[0])
        assert abs(found - best) < 6 * error
    assert 0.1 < special.expit(best) < 0.6
    assert 6 * error < 0.2


def test_variational_gaussian_dropout_matches_its_oracle(key):
    x = inputs((3, 4, 5))
    log_alpha = np.linspace(-6, 1, 5).astype(np.float32)
    noise = special.ndtri(uniform(key, (3, 4, 5))) * np.exp(log_alpha / 2)
    y, tangent = jax.jvp(
        lambda of: dropjax.variational_gaussian_dropout(key, x, of), (jnp.asarray(log_alpha),), (jnp.ones(5),)
    )
    np.testing.assert_allclose(y, x * (1 + noise), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(tangent, x * noise / 2, rtol=2e-5, atol=2e-6)
    same = dropjax.variational_gaussian_dropout(key, x, np.log(0.2 / 0.8))
    np.testing.assert_allclose(same, dropjax.gaussian_dropout(key, x, 0.2), rtol=1e-5, atol=1e-6)


def test_local_reparametrization_matches_its_oracle(key):
    x = inputs((3, 4, 5))
    variance = jnp.asarray(np.random.default_rng(5).uniform(size=(3, 4, 5)), jnp.float32).at[0].set(0)
    noise = special.ndtri(uniform(key, (3, 4, 5)))
    y, back = jax.vjp(lambda of: dropjax.local_reparametrization(key, x, of), variance)
    stddev = np.sqrt(np.asarray(variance, np.float64))
    np.testing.assert_allclose(y, x + stddev * noise, rtol=2e-5, atol=2e-6)
    with np.errstate(divide="ignore"):
        slope = np.where(stddev > 0, noise / (2 * stddev), 0)
    np.testing.assert_allclose(back(jnp.ones_like(y))[0], slope, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (5,), (8, 1), (8, 5)], ids=["layer", "outputs", "inputs", "weights"])
def test_dense_layers_have_the_moments_of_weights_that_are_drawn(shape, key):
    """Oracle: weights from NumPy's normal generator, one set a row; 6 standard errors of both samples."""
    n, rng = 4000, np.random.default_rng(0)
    x = np.asarray(inputs((8,)))
    log_alpha = rng.normal(size=shape).astype(np.float32) - 1
    variance = np.exp(log_alpha) * KERNEL.astype(np.float64) ** 2
    drawn = (KERNEL + np.sqrt(variance) * rng.normal(size=(n, 8, 5))).swapaxes(1, 2) @ x
    rows = jnp.broadcast_to(jnp.asarray(x), (n, 8))
    y = dropjax.variational_dense(key, rows, jnp.asarray(KERNEL), log_alpha)
    log_sigma2 = np.broadcast_to(np.log(variance), (8, 5)).astype(np.float32)
    z = dropjax.sparse_variational_dense(key, rows, jnp.asarray(KERNEL), log_sigma2)
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4)
    total = (x**2 @ np.broadcast_to(variance, (8, 5))).astype(np.float64)
    assert (np.abs(np.mean(y, 0) - drawn.mean(0)) < 6 * np.sqrt(2 * total / n)).all()
    assert (np.abs(np.var(y, 0) - drawn.var(0)) < 6 * np.sqrt(2 * 2 / n) * total).all()
    noise = special.ndtri(uniform(key, (2, 5)))
    np.testing.assert_allclose(y[:2], x @ KERNEL + np.sqrt(total) * noise, rtol=1e-4, atol=1e-4)


# --- divergences ---


def test_concrete_dropout_kl_is_the_formula_of_the_paper():
    kernel, rates = np.random.default_rng(2).normal(size=(3, 2, 4, 5)).astype(np.float32), [0.1, 0.5, 0.9, 0.999]
    logits = special.logit(rates).astype(np.float32)
    m = kernel / (1 - np.array(rates)[:, None])  # the paper's weights are those of kept features
    each = 0.7**2 * (1 - np.array(rates)) / 2 * (m**2).sum((0, 1, 3)) - stats.bernoulli.entropy(rates)
    found = dropjax.concrete_dropout_kl(logits, kernel, length_scale=0.7)
    np.testing.assert_allclose(found, each.sum(), rtol=1e-5)
    n, tau, p = 50, 3.0, 0.1  # the regularisers of the paper's code, beside a mean squared error of 0.2
    code = 0.2 + 0.7**2 / (tau * n) * (kernel**2).sum() / (1 - p) - 2 / (tau * n) * 4 * stats.bernoulli.entropy(p)
    ours = tau / 2 * 0.2 + dropjax.concrete_dropout_kl(logits[0], kernel, length_scale=0.7) / n
    np.testing.assert_allclose(ours, tau / 2 * code, rtol=1e-5)


def divergence(alpha):
    """KL from the log-uniform prior, 0 at infinity: (w / sqrt(alpha))^2 is a Poisson mixture of chi-squares."""
    counts = np.arange(int(1 / alpha / 2 + 12 * np.sqrt(1 / alpha / 2 + 1) + 60))
    weights = stats.poisson.pmf(counts, 1 / alpha / 2)
    log_noise = (np.log(2 * alpha) + (weights * special.digamma(counts + 0.5)).sum()) / 2
    return log_noise - np.log(alpha) / 2 + (np.log(2) + np.euler_gamma) / 2


def test_variational_dropout_kl_by_quadrature():
    """The Poisson mixture against quadrature of E_q[log q(w) - log 1/|w|], for weights of two sizes."""
    for alpha in (0.05, 1.0, 20.0):
        for size in (0.3, 2.0):
            q = stats.norm(size, np.sqrt(alpha) * size)

            def integrand(w, q=q):
                return q.pdf(w) * (q.logpdf(w) + np.log(abs(w)))

            ends = [size - 12 * q.std(), 0, size, size + 12 * q.std()]
            whole = sum(integrate.quad(integrand, *of, limit=200)[0] for of in itertools.pairwise(ends))
            constant = (np.log(2 * np.pi) + 1) / 2 + (np.log(2) + np.euler_gamma) / 2
            np.testing.assert_allclose(whole + constant, divergence(alpha), atol=1e-6)
    log_alpha = np.linspace(-8, 12, 201)
    true = np.array([divergence(of) for of in np.exp(log_alpha)])
    found = dropjax.variational_dropout_kl(jnp.asarray(log_alpha, jnp.float32))
    assert np.abs(found - true).max() < 0.0095
    assert (np.diff(found) < 0).all()
    small = log_alpha <= 0
    cubic = dropjax.variational_dropout_kl(jnp.asarray(log_alpha[small], jnp.float32), approximation="cubic")
    assert np.abs(cubic - true[small]).max() < 0.041
    slopes = jax.vmap(jax.grad(dropjax.variational_dropout_kl))(jnp.array([-jnp.inf, -1e4, 1e4, jnp.inf]))
    np.testing.assert_allclose(slopes, [-0.5, -0.5, 0, 0])


# --- sparsity ---


def test_sparse_weights(key):
    kernel = jnp.array([[1.0, -0.5, 0.1], [0.01, -0.001, 0.0]])
    log_alpha = dropjax.sparse_log_alpha(kernel, -2.0)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(log_alpha, np.minimum(-2 - np.log(np.asarray(kernel) ** 2), 8), rtol=1e-5)
    assert dropjax.sparse_log_alpha(kernel, -20.0).min() == -8
    np.testing.assert_array_equal(dropjax.sparse_kernel(kernel, -2.0), [[1, -0.5, np.float32(0.1)], [0, 0, 0]])
    assert dropjax.sparsity(kernel, -2.0) == 0.5
    assert dropjax.sparsity(kernel, -2.0, threshold=0.0) == np.float32(4 / 6)
    narrow = jnp.ones(2, jnp.bfloat16)  # a log alpha of 3.004 is 3 in bfloat16, at the threshold
    kept = dropjax.sparse_kernel(narrow, jnp.array([3.004, 2.996]))
    assert kept.dtype == jnp.bfloat16
    assert kept.tolist() == [0, 1]
    assert dropjax.sparsity(narrow, 3.004) == 1


def test_gradients_are_finite_for_weights_of_any_size(key):
    sizes = jnp.array([0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-3, 1.0, 1e10])
    kernel = jnp.concatenate([sizes, -sizes])[:, None]

    def loss(kernel, log_sigma2, x):
        kl = dropjax.variational_dropout_kl(dropjax.sparse_log_alpha(kernel, log_sigma2)).sum()
        return kl + dropjax.sparse_variational_dense(key, x, kernel, log_sigma2).sum()

    noises = jnp.array([-200.0, -87.0, -10.0, 0.0, 20.0])[:, None, None] + jnp.zeros((5, 16, 1))
    over = jax.vmap(jax.value_and_grad(loss, (0, 1, 2)), (None, 0, None))
    found = jax.jit(jax.vmap(over, (None, None, 0)))(kernel, noises, jnp.stack([jnp.zeros((2, 16)), jnp.ones((2, 16))]))
    assert all(np.isfinite(of).all() for of in jax.tree.leaves(found))


# --- limits, dtypes, transformations ---


def test_values_and_gradients_are_finite_at_the_limits(key):
    x, logits = inputs(), jnp.array([-np.inf, -1e30, -100, 100, 1e30, np.inf])

    def total(x, logit, temperature):
        y = dropjax.concrete_dropout(key, x, logit, temperature=temperature)
        return y.sum(), y

    over = jax.vmap(jax.value_and_grad(total, (0, 1), has_aux=True), (None, 0, None))
    (_, y), slopes = jax.jit(jax.vmap(over, (None, None, 0)))(x, logits, jnp.array([0.1, 1e-3]))
    np.testing.assert_array_equal(y[:, :3], jnp.broadcast_to(x, (2, 3, *x.shape)))
    np.testing.assert_array_equal(y[:, 3:], 0 * y[:, 3:])
    kl = jax.vmap(jax.value_and_grad(lambda logit: dropjax.concrete_dropout_kl(logit, jnp.ones((3, 4)))))(logits)
    assert all(np.isfinite(of).all() for of in jax.tree.leaves((slopes, kl)))
    y, slope = jax.value_and_grad(lambda a: dropjax.variational_gaussian_dropout(key, x, a).sum())(-jnp.inf)
    assert y == x.sum()
    assert slope == 0


@three
def test_floats_empty_arrays_and_x64(name, key):
    function, value = CASES[name]
    wide = function(key, inputs(dtype=jnp.bfloat16).astype(jnp.float32), value)
    for dtype in (jnp.bfloat16,) if "dense" in name else (jnp.bfloat16, jnp.float16):
        y = function(key, inputs(dtype=jnp.bfloat16).astype(dtype), jnp.asarray(value, dtype))
        assert y.dtype == dtype
        kernel_is_rounded = 0.1 if "dense" in name else jnp.finfo(dtype).eps
        np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=kernel_is_rounded, atol=kernel_is_rounded)
    assert function(key, jnp.zeros((0, 3, 8)), value).shape[:2] == (0, 3)
    with jax.enable_x64(True):
        x = np.asarray(inputs(dtype=jnp.bfloat16), np.float64)
        y = function(key, x, np.float64(value))
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, wide, rtol=1e-4, atol=1e-4)
        step = 1e-6  # a central difference, which float32 could not give: the parameter keeps its precision
        up, down = (function(key, x, jnp.asarray(value + of)).sum() for of in (step, -step))
        slope = jax.grad(lambda p: function(key, x, p).sum())(jnp.asarray(value))
        np.testing.assert_allclose((up - down) / (2 * step), slope, rtol=1e-5)


@elementwise
def test_scalars_and_complex(name, key):
    function, value = CASES[name]
    assert function(key, 2.0, value).dtype == jnp.float32
    if name == "local_reparametrization":
        return
    x = inputs()
    np.testing.assert_allclose(
        function(key, x.astype(jnp.complex64) * 1j, value).imag, function(key, x, value), rtol=1e-6
    )


@pytest.mark.slow
@three
def test_transformations(name, key):
    """jit, scan, remat and vmap over each argument give what a call gives."""
    function, value = CASES[name]
    x, keys = inputs(), jax.random.split(key, 3)
    values = jnp.float32(value) * jnp.array([0.5, 1.0, 1.5])
    xs = jnp.stack([x, 2 * x, 3 * x])

    def both(key, x, value):
        return jax.value_and_grad(lambda x, value: (function(key, x, value) ** 2).sum(), (0, 1))(x, value)

    def alike(a, b):
        for i, j in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(i, j, rtol=2e-5, atol=1e-4)

    expected = both(keys[0], xs[0], values[0])
    rows = jax.jit(jax.vmap(both))(keys, xs, values)
    _, scanned = jax.jit(lambda: jax.lax.scan(lambda c, of: (c, both(*of)), 0, (keys, xs, values)))()
    alike(jax.tree.map(lambda of: of[0], rows), expected)
    alike(scanned, rows)
    remat = jax.checkpoint(lambda x, value: function(keys[0], x, value))
    alike(jax.value_and_grad(lambda *of: (remat(*of) ** 2).sum(), (0, 1))(xs[0], values[0]), expected)
    tangent = jax.jvp(lambda v: (function(keys[0], xs[0], v) ** 2).sum(), (values[0],), (jnp.float32(1),))[1]
    alike(tangent, expected[1][1])


@three
def test_pieces_and_shards_are_parts_of_the_whole(name, key):
    function, value = CASES[name]
    x = inputs((8, 4, 8))
    whole = function(key, x, value)
    pieces = jax.jit(lambda first: function(key, jax.lax.dynamic_slice_in_dim(x, first, 4), value, start={0: first}))
    for first in (0, 4):
        np.testing.assert_allclose(pieces(first), whole[first : first + 4], rtol=2e-6, atol=2e-6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharded(**options):
        step = lambda x: function(key, x, value, **options)  # noqa: E731
        return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)

    np.testing.assert_allclose(sharded(sharded_dims={0: "data"}), whole, rtol=2e-6, atol=2e-6)
    with pytest.raises(ValueError, match="must be accounted for over mesh axis 'data'"):
        sharded()


@every
def test_only_the_key_and_what_the_derivative_needs_is_kept(name, key, capsys):
    function, value = CASES[name]
    x, dense = inputs((64, 8, 8)), "dense" in name
    jax.ad_checkpoint.print_saved_residuals(lambda x: function(key, x, value), x)
    kept = sorted(line.split()[0] for line in capsys.readouterr().out.splitlines())
    if not dense:  # a dense layer needs its input, its weights and the variance of its output
        assert kept == ([] if name == "local_reparametrization" else ["key<fry>[]"])
    jax.ad_checkpoint.print_saved_residuals(lambda x, v: function(key, x, v), x, jnp.float32(value))
    kept = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    noise = {"f32[64,8,5]"} if dense else {"f32[64,8,8]"} if name != "local_reparametrization" else set()
    zeros = {"bool[8,5]"}  # which weights are 0, and have no noise
    assert kept - {"f32[8,5]", "f32[64,8,8]", "f32[]", "f32[1,1]", "key<fry>[]", "bool[]"} <= noise | zeros


# --- what users get wrong ---


@elementwise
@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (np.nan, ValueError, "must be in [-inf, inf"),
        ("half", TypeError, "must be a number or a float array, got 'half' (str)."),
        (np.zeros(3), ValueError, "of x, got shape (3,). Add axes of length 1 until it does."),
    ],
    ids=str,
)
def test_bad_parameters(name, value, kind, message):
    function, argument = CASES[name][0], {"c": "rate_logit", "v": "log_alpha", "l": "variance"}[name[0]]
    message = message.replace("[-inf, inf", "[0, inf") if argument == "variance" else message
    with pytest.raises(kind) as caught:
        function(jax.random.key(0), inputs(), value)
    assert str(caught.value).startswith(f"{name}: {argument} must ")
    assert message in str(caught.value)


BAD = [
    (lambda k, x: dropjax.concrete_dropout(k, x, 0.0, temperature=0), "temperature must be in (0, 1], got 0.0."),
    (lambda k, x: dropjax.concrete_dropout(k, x, 0.0, temperature=2.0), "temperature must be in (0, 1], got 2.0."),
    (lambda k, x: dropjax.local_reparametrization(k, x, -0.1), "variance must be in [0, inf), got -0.1."),
    (lambda k, x: dropjax.variational_gaussian_dropout(k, x, np.inf), "log_alpha must be in [-inf, inf), got inf."),
    (lambda k, x: dropjax.variational_dense(k, x, KERNEL, np.nan), "log_alpha must be in [-inf, inf), got nan."),
    (lambda k, x: dropjax.sparse_log_alpha(KERNEL, np.inf), "log_sigma2 must be in [-inf, inf), got inf."),
    (lambda k, x: dropjax.variational_dropout_kl(jnp.full(2, np.nan)), "log_alpha must be in [-inf, inf], got nan."),
    (lambda k, x: dropjax.variational_dense(k, x, KERNEL[:3], 0.0), "kernel must be [features, outputs] for x"),
    (lambda k, x: dropjax.variational_dense(k, x, KERNEL, np.zeros(8)), "log_alpha must broadcast against the kernel"),
    (lambda k, x: dropjax.sparse_variational_dense(k, x, KERNEL, KERNEL.T), "log_sigma2 must broadcast against"),
    (
        lambda k, x: dropjax.sparse_log_alpha(KERNEL, np.zeros(8)),
        "log_sigma2 must broadcast against the kernel's shape",
    ),
    (lambda k, x: dropjax.concrete_dropout_kl(np.zeros(3), KERNEL), "rate_logit must broadcast against"),
    (lambda k, x: dropjax.concrete_dropout_kl(0.0, KERNEL[0]), "kernel must be [..., features, outputs], got float32"),
    (lambda k, x: dropjax.variational_dropout_kl(0.1, approximation="cubic"), "log_alpha must not be above 0"),
    (lambda k, x: dropjax.variational_dropout_kl(0.1, approximation="b"), "approximation must be 'sigmoid' or 'cubic'"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[of for _, of in BAD])
def test_bad_values(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
        call(jax.random.key(0), inputs())
    assert f": {message}" in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        *(lambda k, v, f=f: f(k, inputs(), v) for f, _ in CASES.values()),
        lambda k, v: dropjax.variational_dense(k, inputs(), KERNEL, v),
        lambda k, v: dropjax.sparse_log_alpha(KERNEL, v),
        lambda k, v: dropjax.concrete_dropout_kl(v, KERNEL),
        lambda k, v: dropjax.variational_dropout_kl(v),
    ],
)
def test_what_is_learned_is_a_number_or_a_float_array(call, key):
    np.testing.assert_allclose(call(key, 0), call(key, jnp.float32(0)), rtol=1e-5)
    for value in (np.ones(5, np.int32), jnp.int32(1), True, 1j, None):
        with pytest.raises(TypeError, match=r": \w+ must be a number or a float array, got .*[^.]\.$"):
            call(key, value)


def test_traced_values_out_of_range_are_nan(key):
    x = inputs()
    functions = {
        0.0: lambda v: dropjax.concrete_dropout(key, x, 0.0, temperature=v),
        1.5: lambda v: dropjax.concrete_dropout(key, x, 0.0, temperature=v),
        -0.1: lambda v: dropjax.local_reparametrization(key, x, v),
        0.1: lambda v: dropjax.variational_dropout_kl(v, approximation="cubic"),
    }
    for value, function in functions.items():
        assert np.isnan(jax.jit(function)(jnp.float32(value))).all()
    for function, _ in CASES.values():
        assert np.isnan(jax.jit(lambda v, function=function: function(key, x, v))(jnp.float32(np.nan))).all()
