"""Regression and stopping against closed forms; samples over a mesh; keys of every kind; bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import special, stats

import dropjax
from dropjax import mc

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
LEVELS = [0.0, 0.05, 0.5, 0.9, 1.0]


def means(key):
    return dropjax.dropout(key, jnp.tanh(X), 0.4) @ W


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_regress_is_the_summary_of_the_samples(key, chunk_size):
    """Gaussians of given precision: the mixture's variance, its density, and order statistics, by NumPy."""
    targets = jnp.ones((8, 3))

    @jax.jit
    def run(key):
        summary = mc.regress(
            means, key, 50, targets=targets, precision=4.0, event_dims=1, quantiles=LEVELS, chunk_size=chunk_size
        )
        pair = mc.regress(
            lambda key: (means(key), means(key) ** 2 + 0.5), key, 50, targets=targets, chunk_size=chunk_size
        )
        return summary, pair, mc.sample(means, key, 50)

    summary, pair, samples = jax.tree.map(np.asarray, run(key))
    samples = samples.astype(np.float64)
    np.testing.assert_allclose(summary.mean, samples.mean(0), atol=1e-6)
    np.testing.assert_allclose(summary.epistemic, samples.var(0), rtol=1e-5)
    np.testing.assert_allclose(summary.aleatoric, 0.25)
    np.testing.assert_allclose(summary.total, samples.var(0) + 0.25, rtol=1e-5)
    logs = stats.norm.logpdf(1, samples, 0.5).sum(-1)
    np.testing.assert_allclose(summary.log_likelihood, special.logsumexp(logs, 0) - np.log(50), rtol=1e-5)
    exact = np.quantile(samples, LEVELS, axis=0, method="inverted_cdf")
    assert (np.abs(summary.quantiles - exact) <= np.ptp(samples, 0) / 4096 + 1e-6).all()
    np.testing.assert_allclose(summary.quantiles[[0, -1]], exact[[0, -1]], atol=1e-6)
    np.testing.assert_allclose(pair.aleatoric, (samples**2).mean(0) + 0.5, rtol=1e-4)
    np.testing.assert_allclose(pair.total, samples.var(0) + (samples**2).mean(0) + 0.5, rtol=1e-4)
    logs = stats.norm.logpdf(1, samples, np.sqrt(samples**2 + 0.5))
    np.testing.assert_allclose(pair.log_likelihood, special.logsumexp(logs, 0) - np.log(50), rtol=1e-3, atol=1e-3)


def test_chunks_of_float64_agree_to_its_rounding(key):
    """A relative 2^-53 for each of some tens of operations on numbers up to 3^2: below 1e-12."""

    def fn(key):
        x = jax.random.bits(key, (3,), jnp.uint32).astype(jnp.float64) * (3 / 2**32)
        return x, x**2

    with jax.enable_x64(True):
        samples, found = jax.jit(lambda key: (mc.sample(fn, key, 10), mc.regress(fn, key, 10, chunk_size=3)))(key)
    means, variances = np.asarray(samples)
    np.testing.assert_allclose(found.mean, means.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.epistemic, means.var(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.aleatoric, variances.mean(0), rtol=0, atol=1e-12)


def test_the_predictive_of_a_linear_gaussian_model(key):
    """Weights N(m, s^2): the predictive at x is N(x m, x^2 s^2 + 1 / precision)."""
    m, s, precision, n = 1.5, 0.5, 2.0, 20_000
    x = jnp.array([0.5, 2.0])

    def fn(key):
        return x * (m + s * jax.random.normal(key))

    summary = jax.jit(lambda key: mc.regress(fn, key, n, targets=2 * x, precision=precision, chunk_size=1000))(key)
    mean, total = np.asarray(x) * m, np.asarray(x) ** 2 * s**2 + 1 / precision
    assert (np.abs(summary.mean - mean) < 5 * np.asarray(x) * s / np.sqrt(n)).all()
    assert (np.abs(summary.total - total) < 5 * np.asarray(x) ** 2 * s**2 * np.sqrt(2 / n)).all()
    density = stats.norm.logpdf(2 * np.asarray(x), mean, np.sqrt(total))
    np.testing.assert_allclose(summary.log_likelihood, density, atol=0.03)  # density ratios below 3, over sqrt(20,000)


def test_regress_where_densities_underflow_and_outputs_are_bad(key):
    far = mc.regress(lambda key: jnp.zeros(2), key, 1, targets=jnp.full(2, 1e4), precision=1.0)
    np.testing.assert_allclose(far.log_likelihood, -5e7, rtol=1e-6)

    def fn(key):
        return jnp.array([1.0, jnp.nan]) * jax.random.normal(key), jnp.array([-1.0, 1.0])

    with pytest.warns(UserWarning, match="regress: fn returned what is not finite, .* for 2 of 2 inputs"):
        bad = mc.regress(fn, key, 4, quantiles=[0.5])
    assert bad.invalid.all()
    assert jnp.isnan(bad.total).all()
    assert jnp.isnan(bad.quantiles).all()


def test_what_is_invalid_is_nan_and_nothing_else(key):
    """Outputs: good, infinite, of a variance that overflows, of variance 0, of a NaN target."""

    def fn(key):
        sign = jnp.where(jax.random.bernoulli(key), 1.0, -1.0)
        means = jnp.array([0.0, 1.0, 3e38, 1.0, 1.0]) * sign + jnp.array([0.0, jnp.inf, 0, 0, 0])
        return means, jnp.array([1.0, 1.0, 1.0, 0.0, 1.0])

    @jax.jit
    def run(key, precision):
        targets = jnp.array([0.0] * 4 + [jnp.nan])
        plain = mc.regress(lambda key: fn(key)[0][:1], key, 8, targets=targets[:1], precision=precision)
        return mc.regress(fn, key, 8, targets=targets, quantiles=[0.5], chunk_size=3), mc.regress(fn, key, 8), plain

    summary, without, bad = run(key, -1.0)
    np.testing.assert_array_equal(summary.invalid, [False, True, False, True, False])
    for field in [summary.mean, summary.epistemic, summary.aleatoric, summary.total, summary.quantiles[0]]:
        np.testing.assert_array_equal(jnp.isnan(field), summary.invalid)
    assert jnp.isfinite(summary.mean[2])
    np.testing.assert_array_equal(
        [summary.epistemic[2], summary.total[2], summary.log_likelihood[2]], [np.inf] * 2 + [-np.inf]
    )
    np.testing.assert_array_equal(jnp.isnan(summary.log_likelihood), [False, True, False, True, True])
    np.testing.assert_allclose(summary.log_likelihood[0], stats.norm.logpdf(0), rtol=1e-6)
    np.testing.assert_array_equal(without.invalid, [False, True, False, False, False])
    assert bad.invalid.all()
    assert jnp.isnan(jnp.stack([bad.mean, bad.aleatoric, bad.total, bad.log_likelihood])).all()
    wide = jax.jit(lambda key: mc.regress(lambda _: (jnp.zeros(1), jnp.full(1, 3e38)), key, 1, targets=jnp.zeros(1)))
    np.testing.assert_allclose(wide(key).log_likelihood, stats.norm.logpdf(0, scale=np.sqrt(3e38)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"regress: precision must be positive, from 1.18e-38 .* got 1e-39"):
        mc.regress(lambda key: fn(key)[0], key, 8, precision=1e-39)


@pytest.mark.slow
def test_memory_is_that_of_a_chunk(key):
    x = jnp.ones((256, 64))

    def fn(key):
        return dropjax.dropout(key, x, 0.5)

    def memory(summary, n, **options):
        run = jax.jit(lambda key: summary(fn, key, n, **options)).lower(key).compile()
        return run.memory_analysis().temp_size_in_bytes

    for summary, options in [(mc.classify, {}), (mc.regress, {"quantiles": [0.1, 0.9]})]:
        assert memory(summary, 4000, chunk_size=4, **options) <= 1.1 * memory(summary, 40, chunk_size=4, **options)
    assert memory(mc.classify, 4000, chunk_size=4) < 100 * x.nbytes
    assert memory(mc.regress, 4000, chunk_size=4, quantiles=[0.1, 0.9]) < (6 * 64 + 100) * x.nbytes


@pytest.mark.slow
def test_it_stops_when_it_is_known(key):
    """The standard error of a mean of n samples is sd / sqrt(n - 1): n is the first chunk's end where it is small."""

    @jax.jit
    def run(key):
        stopped = mc.regress(means, key, 2000, tolerance=0.1, chunk_size=8, quantiles=[0.5])
        never = mc.regress(means, key, 20, tolerance=1e-9, chunk_size=8)
        by_class = mc.classify(means, key, 2000, tolerance=0.02)
        others = [
            mc.classify(means, key, 4000, tolerance=0.05, chunk_size=50, statistic=name)
            for name in ["expected_entropy", "predictive_entropy", "mutual_information"]
        ]
        return stopped, never, by_class, others, mc.sample(means, key, 2000)

    stopped, never, by_class, others, samples = run(key)
    samples = np.asarray(samples, np.float64)
    errors = {n: (samples[:n].std(0, ddof=1) / np.sqrt(n)).max() for n in range(2, 2000)}
    n = int(stopped.num_samples)
    assert n % 8 == 0
    assert errors[n] <= 0.1 < errors[n - 8]
    np.testing.assert_allclose(stopped.mean, samples[:n].mean(0), atol=1e-5)
    exact = np.quantile(samples[:n], 0.5, axis=0, method="inverted_cdf")
    assert (np.abs(stopped.quantiles[0] - exact) <= np.ptp(samples[:n], 0) / 4096 + 1e-6).all()
    assert never.num_samples == 20
    p = special.softmax(samples, -1)
    n = int(by_class.num_samples)
    assert (p[:n].std(0, ddof=1) / np.sqrt(n)).max() <= 0.02 < (p[: n - 10].std(0, ddof=1) / np.sqrt(n - 10)).max()
    assert by_class.votes.sum() == 8 * n
    entropies = stats.entropy(p, axis=-1)
    n = int(others[0].num_samples)
    assert n % 50 == 0
    assert (entropies[:n].std(0, ddof=1) / np.sqrt(n)).max() <= 0.05
    # the bounds hold: over replicas of n samples the entropies really vary by no more
    for name, summary in zip(["predictive_entropy", "mutual_information"], others[1:], strict=True):
        n = int(summary.num_samples)
        parts = p[: 2000 // n * n].reshape(-1, n, *p.shape[1:]) if n <= 1000 else None
        assert parts is not None
        total = stats.entropy(parts.mean(1), axis=-1)
        values = total if name == "predictive_entropy" else total - stats.entropy(parts, axis=-1).mean(1)
        assert (values.std(0) <= 0.05 * 1.5).all()  # few replicas: half as much again


@pytest.mark.slow
def test_a_tolerance_is_looked_at_after_full_chunks():
    """Two more samples at most do not stop it earlier, though in some the first two agree; the last two do count."""

    def fn(key):
        return jnp.where(jax.random.bernoulli(key, 0.2), jnp.array([[4.0, 0.0]]), jnp.array([[0.0, 4.0]]))

    @jax.jit
    @jax.vmap
    def run(seed):
        key = jax.random.key(seed)
        stopped = [mc.classify(fn, key, n, tolerance=0.03) for n in (1000, 1002)]
        return stopped, mc.classify(fn, key, 12, tolerance=1e-9), mc.classify(fn, key, 12)

    (even, odd), most, whole = run(jnp.arange(8))
    np.testing.assert_array_equal(even.num_samples, odd.num_samples)
    np.testing.assert_allclose(even.probabilities, odd.probabilities, atol=1e-6)
    assert (odd.num_samples % 10 == 0).all()
    full = np.asarray(most.num_samples) == 12
    assert full.any()
    np.testing.assert_allclose(most.probabilities[full], whole.probabilities[full], atol=1e-6)


@pytest.mark.slow
def test_samples_over_a_mesh_are_the_same(key):
    """Samples, the batch, or both over the devices; T not divisible; automatic and explicit axes."""

    def both(x):
        return lambda key: (dropjax.keep_mask(key, (3, 5), 0.5), dropjax.dropout(key, jnp.tanh(x), 0.4) @ W)

    expected = mc.sample(both(X), key, 11)
    summary = mc.classify(lambda key: both(X)(key)[1], key, 11)
    for kind in [AxisType.Auto, AxisType.Explicit]:
        mesh = jax.make_mesh((4, 2), ("samples", "data"), axis_types=(kind, kind))
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))

        @jax.jit
        def run(x, key, mesh=mesh):
            place = {"mesh": mesh, "axes": "samples"}
            samples = mc.sample(both(x), key, 11, **place), mc.sample(both(x), key, 11, chunk_size=3, **place)
            return samples, mc.classify(lambda key: both(x)(key)[1], key, 11, chunk_size=3, **place)

        samples, merged = run(x, key)
        for masks, values in samples:
            np.testing.assert_array_equal(masks, expected[0])
            np.testing.assert_allclose(values, expected[1], atol=1e-5)
        for field, other in zip(merged, summary, strict=True):
            np.testing.assert_allclose(field, other, atol=1e-5)
    alone = jax.make_mesh((8,), ("samples",), axis_types=(AxisType.Auto,))
    spread = jax.jit(lambda key: mc.sample(both(X), key, 16, mesh=alone))(key)
    assert spread[1].sharding.spec[0] in ("samples", ("samples",))
    np.testing.assert_array_equal(spread[0][:11], expected[0])


def test_stopping_inside_shard_map(key):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    cut = PartitionSpec("data")

    def stop(x):
        fn = lambda key: dropjax.dropout(key, x, 0.5, sharded_dims={0: "data"})  # noqa: E731
        return mc.classify(fn, key, 200, tolerance=0.05).probabilities

    shards = jax.shard_map(stop, mesh=mesh, in_specs=cut, out_specs=cut)
    assert jnp.isfinite(jax.jit(shards)(X)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [jax.random.PRNGKey, *[lambda s, i=i: jax.random.key(s, impl=i) for i in ("rbg", "unsafe_rbg")]]
)
def test_draws_of_jax_random_are_those_of_a_loop(make):
    """For rbg keys vmap draws something else than a loop: samples are then computed one by one."""
    key = make(3)

    def fn(key):
        first, second = jax.random.split(key)
        return jax.random.bernoulli(first, 0.5, (16,)), jax.random.normal(second, (4,))

    loop = [fn(jax.random.fold_in(key, t)) for t in range(5)]
    for chunk_size in [None, 2]:
        masks, noise = jax.jit(lambda key, c=chunk_size: mc.sample(fn, key, 5, chunk_size=c))(key)
        np.testing.assert_array_equal(masks, jnp.stack([of[0] for of in loop]))
        np.testing.assert_allclose(noise, jnp.stack([of[1] for of in loop]), rtol=1e-6)


BAD = {
    "num_samples must be at least 1, got 0": lambda key: mc.sample(means, key, 0),
    "chunk_size must be at least 1, got 0": lambda key: mc.regress(means, key, 5, chunk_size=0),
    "tolerance must be positive, got -0.1": lambda key: mc.classify(means, key, 5, tolerance=-0.1),
    "tolerance must be a number, got 'low'": lambda key: mc.regress(means, key, 5, tolerance="low"),
    "statistic must be one of": lambda key: mc.classify(means, key, 5, statistic="mean"),
    "fn must be a function of a key": lambda key: mc.regress(X, key, 5),
    "fn must return means": lambda key: mc.regress(lambda key: (means(key), X), key, 5),
    "targets must have the shape": lambda key: mc.regress(means, key, 5, targets=X[:, 0], precision=1.0),
    "precision must be given with targets": lambda key: mc.regress(means, key, 5, targets=X @ W),
    "precision must be None where": lambda key: mc.regress(lambda k: (means(k), means(k)), key, 5, precision=1.0),
    "precision must be positive, from .* got 0": lambda key: mc.regress(means, key, 5, precision=0),
    "precision must broadcast": lambda key: mc.regress(means, key, 5, precision=jnp.ones(7)),
    "statistic must be one of .*, got int64": lambda key: mc.classify(means, key, 5, statistic=np.arange(2)),
    "precision must be an array of numbers, got 'a'": lambda key: mc.regress(means, key, 5, precision="a"),
    "precision must be real numbers, got complex64": lambda key: mc.regress(means, key, 5, precision=1j),
    "targets must be an array of numbers, got": lambda key: mc.regress(means, key, 5, targets=means, precision=1.0),
    "quantiles must be a sequence of numbers": lambda key: mc.regress(means, key, 5, quantiles=10**400),
    "quantiles must be numbers in": lambda key: mc.regress(means, key, 5, quantiles=[50]),
    "event_dims must be at most": lambda key: mc.regress(means, key, 5, event_dims=3),
    "axes must be given with a mesh": lambda key: mc.sample(means, key, 5, axes="data"),
    "mesh must be a jax.sharding.Mesh": lambda key: mc.sample(means, key, 5, mesh="data"),
    "axes must be among the mesh's": lambda key: mc.sample(
        means, key, 5, mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), axes="model"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(key, message):
    with pytest.raises((TypeError, ValueError), match=r"(sample|classify|regress): " + message):
        BAD[message](key)


def test_a_function_that_ignores_its_key(key):
    with pytest.warns(UserWarning, match="regress: fn ignores its key"):
        summary = mc.regress(lambda key: X @ W, key, 5)
    assert (summary.epistemic == 0).all()
