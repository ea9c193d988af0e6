"""Streamed summaries against NumPy in float64: far from 0, over many chunks, at the ends of what floats hold."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType
from scipy import special

from dropjax import mc
from dropjax.mc import order, running

T, CHUNKS, LEVELS = 2000, (None, 1, 10), [0.05, 0.25, 0.5, 0.95]
STREAMS = {
    "1e5 ± 1": lambda key: 1e5 + jax.random.normal(key, (3,)),
    "1e6 ± 0.1": lambda key: 1e6 + 0.1 * jax.random.normal(key, (3,)),
    "-3e4 ± 0.01": lambda key: 0.01 * jax.random.normal(key, (3,)) - 3e4,
    "around 0": lambda key: jax.random.normal(key, (3,)),
    "rare": lambda key: jnp.where(jax.random.uniform(key, (3,)) < 0.01, 7.1, 0.3),
    "an outlier first": lambda key: jnp.where(jnp.arange(3) < 2, 1e-3, 1.0) * jax.random.cauchy(key, (3,)),
    "1e18": lambda key: 1e18 * jax.random.normal(key, (3,)),
}


def rank(level, count):
    return math.ceil(round(level * count, 6)) - 1


def check(summary, x, of_mean=1e-6):
    """To a step of the mean, or a part of the deviation; quantiles to 1 / 4096 of the range."""
    step = np.spacing(np.abs(x.mean(0)).astype(summary.mean.dtype))
    assert (np.abs(summary.mean - x.mean(0)) <= step + of_mean * x.std(0)).all()
    np.testing.assert_allclose(summary.epistemic, x.var(0), rtol=3e-6)
    if summary.aleatoric is not None:
        np.testing.assert_allclose(summary.aleatoric, np.abs(x).mean(0), rtol=3e-6)
    if summary.quantiles is not None:
        want = np.sort(x, 0)[[rank(level, len(x)) for level in LEVELS]]
        assert (np.abs(summary.quantiles - want) <= np.ptp(x, 0) / 4096).all()


@pytest.mark.slow
def test_means_variances_and_quantiles_do_not_drift(key):
    def means(key):
        return jnp.stack([stream(key) for stream in STREAMS.values()])

    def pair(key):
        return means(key), jnp.abs(means(key))

    @jax.jit
    def run(key):
        summaries = [mc.regress(pair, key, T, chunk_size=size) for size in CHUNKS]
        return mc.sample(means, key, T), [*summaries, mc.regress(means, key, T, chunk_size=10, quantiles=LEVELS)]

    samples, summaries = run(key)
    for summary in summaries:
        check(jax.tree.map(np.asarray, summary), np.asarray(samples).astype(np.float64))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_streams_are_summed_as_wide_ones(key, dtype):
    """Sums of 6e4 overflow float16, and bfloat16 stalls at 256."""

    def fn(key):
        return (6e4 + 2e3 * jax.random.uniform(key, (3,))).astype(dtype)

    samples, summary = jax.jit(lambda key: (mc.sample(fn, key, T), mc.regress(fn, key, T, chunk_size=10)))(key)
    check(jax.tree.map(np.asarray, summary), np.asarray(samples).astype(np.float64))


@pytest.mark.slow
def test_streams_of_float64_a_tolerance_and_a_mesh(key):
    """Stopped streams sum as the others do; devices share a chunk."""
    mesh = jax.make_mesh((4,), ("samples",), axis_types=(AxisType.Auto,))

    def narrow(key):
        return 1e5 + jax.random.normal(key, (2,), jnp.float32)

    @jax.jit
    def run(key):
        stopped = mc.regress(narrow, key, T, tolerance=0.05)
        return mc.sample(narrow, key, T), stopped, mc.regress(narrow, key, T, chunk_size=12, mesh=mesh)

    samples, stopped, shared = jax.tree.map(np.asarray, run(key))
    n = int(stopped.num_samples)
    check(stopped, samples[:n].astype(np.float64))
    assert (samples[:n].std(0, ddof=1) / np.sqrt(n)).max() <= 0.05 * 1.001
    check(shared, samples.astype(np.float64))
    with jax.enable_x64(True):

        def wide(key):
            return 1e9 + jax.random.normal(key, (2,), jnp.float64)

        samples, summary = jax.jit(lambda key: (mc.sample(wide, key, T), mc.regress(wide, key, T, chunk_size=10)))(key)
    x = np.asarray(samples) - 1e9
    np.testing.assert_allclose(np.asarray(summary.mean) - 1e9, x.mean(0), atol=2e-7)  # a step is 1.2e-7
    np.testing.assert_allclose(summary.epistemic, x.var(0), rtol=1e-12)


def test_log_likelihoods_of_many_chunks(key):
    """The density of 1 in 20,000 chunks of one sample; the largest of them comes late, or first."""

    def fn(key):
        return jax.random.normal(key, (2,)) * jnp.array([1.0, 1e-3]) + jnp.array([0.0, 10.0])

    @jax.jit
    def run(key):
        summary = mc.regress(fn, key, 20_000, targets=jnp.array([1.0, 10.0]), precision=100.0, chunk_size=1)
        return summary.log_likelihood, mc.sample(fn, key, 20_000)

    density, samples = run(key)
    logs = -0.5 * (np.square(np.array([1.0, 10.0]) - np.asarray(samples, np.float64)) * 100 + np.log(2 * np.pi / 100))
    want = special.logsumexp(logs, 0) - np.log(20_000)
    np.testing.assert_allclose(density, want, rtol=0, atol=1e-5)


CLASSES = {
    "4e-5 nats": lambda key: jnp.array([3.0, 0, -2]) + 0.02 * jax.random.normal(key, (3,)),
    "1e-9 nats": lambda key: jnp.array([0.5, 0, -1]) + 1e-4 * jax.random.normal(key, (3,)),
    "nearly certain": lambda key: jnp.array([20.0, 0, -2]) + jax.random.normal(key, (3,)),
    "certain of each": lambda key: 30 * jax.random.normal(key, (3,)),
    "an offset": lambda key: 1e5 + jax.random.normal(key, (3,)),
}


def entropy(p):
    """With 1 - p of the largest as the sum of the others."""
    largest = np.arange(p.shape[-1]) == p.argmax(-1)[..., None]
    others = np.where(largest, 0, p)
    rest = others.sum(-1)
    return special.entr(others).sum(-1) - (1 - rest) * np.log1p(-rest)


def information(p):
    """Mean KL to the mean, with (1 + u) log(1 + u) - u as its series where u is small."""
    mean = p.mean(0)
    u = p / mean - 1
    series = sum((-u) ** k / (k * (k - 1)) for k in range(2, 9))
    return (mean * np.where(np.abs(u) < 1e-2, series, special.xlogy(1 + u, 1 + u) - u)).sum(-1).mean(0)


def test_information_and_entropies_keep_their_digits(key):
    def fn(key):
        return jnp.stack([row(key) for row in CLASSES.values()])

    @jax.jit
    def run(key):
        return mc.sample(fn, key, T), [mc.classify(fn, key, T, chunk_size=size) for size in CHUNKS]

    logits, summaries = run(key)
    p = special.softmax(np.asarray(logits, np.float64), -1)
    best = np.arange(p.shape[-1]) == p.mean(0).argmax(-1)[:, None]
    for summary in summaries:
        np.testing.assert_allclose(summary.mutual_information, information(p), rtol=2e-4)
        np.testing.assert_allclose(summary.predictive_entropy, entropy(p.mean(0)), rtol=2e-6)
        np.testing.assert_allclose(summary.expected_entropy, entropy(p).mean(0), rtol=2e-6)
        np.testing.assert_allclose(summary.variance, np.where(best, 0, p).sum(-1).var(0), rtol=2e-4)
        np.testing.assert_allclose(summary.probabilities, p.mean(0), rtol=3e-6)


@pytest.mark.slow
def test_gradients_of_streamed_summaries_are_those_of_one_formula(key):
    """Also of a class that is never seen, and of one that takes all."""
    noise = jax.random.normal(key, (7, 4))

    def fn(shift):
        def logits(key):
            z = jax.random.normal(key, (4,)) + shift * jnp.arange(4.0)
            return z + jnp.array([0.0, -300.0, 0.0, 40.0]) * (shift - 0.5)

        return logits

    def formula(shift):
        logits = jax.vmap(lambda t: fn(shift)(jax.random.fold_in(key, t)))(jnp.arange(7))
        log_p = jax.nn.log_softmax(logits)
        p = jnp.exp(log_p)
        mean = p.mean(0)
        total = -(mean * jnp.log(jnp.where(mean > 0, mean, 1))).sum()
        return total, -(p * log_p).sum(-1).mean()

    def streamed(shift):
        summary = mc.classify(fn(shift), key, 7, chunk_size=3)
        return summary.predictive_entropy, summary.expected_entropy, summary.mutual_information

    for shift in (0.5, 0.6, 1.5):
        total, expected = jax.jacrev(formula)(shift)
        found = jax.jit(jax.jacrev(streamed))(shift)
        np.testing.assert_allclose(found, [total, expected, total - expected], rtol=1e-3, atol=1e-6)
    mean, variance = noise.mean(0), noise.var(0)
    moments = jax.grad(
        lambda x: running.moments(x)[0].mean.value @ mean + running.moments(x)[0].variance.value @ variance
    )
    np.testing.assert_allclose(
        moments(noise), jax.grad(lambda x: x.mean(0) @ mean + x.var(0) @ variance)(noise), rtol=1e-5
    )


LOGITS = {  # and its probabilities, None where there are none
    "1e10": ([1e10, 1.0, -1e10], [1, 0, 0]),
    "the largest float": ([3.4e38, -3.4e38, 0.0], [1, 0, 0]),
    "two of the largest": ([3.4e38, 3.4e38, -3.4e38], [0.5, 0.5, 0]),
    "all the least": ([-3.4e38] * 3, [1 / 3] * 3),
    "a class masked": ([0.0, -np.inf, 0.0], [0.5, 0, 0.5]),
    "all but one masked": ([-np.inf, -np.inf, -3.4e38], [0, 0, 1]),
    "masked and largest": ([-np.inf, 3.4e38, 3.4e38], [0, 0.5, 0.5]),
    "all masked": ([-np.inf] * 3, None),
    "infinite": ([np.inf, 0.0, 0.0], None),
    "both infinities": ([np.inf, -np.inf, 0.0], None),
    "not a number": ([np.nan, 0.0, 0.0], None),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_field_is_finite_or_flagged(key, dtype):
    rows, largest = np.array([row for row, _ in LOGITS.values()]), float(jnp.finfo(dtype).max)
    rows = jnp.asarray(np.where(np.isfinite(rows), np.clip(rows, -largest, largest), rows), dtype)

    def fn(key):
        return rows + 0 * jax.random.normal(key, (), dtype)

    good = np.array([want is not None for _, want in LOGITS.values()])
    for size in (None, 3):
        summary = jax.jit(lambda key, size=size: mc.classify(fn, key, 8, chunk_size=size))(key)
        np.testing.assert_array_equal(summary.invalid, ~good)
        for field in [*summary[:4], summary.variation_ratio, summary.variance]:
            assert np.isfinite(field[good]).all()
            assert np.isnan(field[~good]).all()
        for row, (_, want) in enumerate(LOGITS.values()):
            if want is not None:
                np.testing.assert_allclose(summary.probabilities[row], want, atol=1e-6)


def test_products_that_xla_fuses_with_differences(key):
    """s n - max(s n) is not 0 where it is rounded once."""

    def fn(key):
        return 1e10 * jax.random.normal(key, (4, 5))

    summary = jax.jit(lambda key: mc.classify(fn, key, 50, chunk_size=10))(key)
    assert not summary.invalid.any()
    np.testing.assert_allclose(summary.probabilities.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(summary.probabilities * 50, summary.votes, rtol=1e-6)


def test_regressions_at_the_ends_of_floats(key):
    """Means are finite, variances infinite where they are; a sample that is not finite is flagged."""
    scale = jnp.array([3.4e38, 1e38, 1e19, 1e18, 1e-30, 0.0, jnp.inf, jnp.nan])

    def fn(key):
        sign = jnp.where(jax.random.bernoulli(key), 1.0, -1.0)
        return scale * sign

    @jax.jit
    def run(key):
        options = {"targets": jnp.zeros(8), "precision": 1.0, "quantiles": [0.0, 0.5, 1.0]}
        return [mc.regress(fn, key, 40, chunk_size=size, **options) for size in (None, 1, 7)], mc.sample(fn, key, 40)

    summaries, samples = run(key)
    x = np.asarray(samples, np.float64)[:, :6]
    for summary in summaries:
        np.testing.assert_array_equal(summary.invalid, [False] * 6 + [True] * 2)
        for field in [*summary[:4], summary.log_likelihood, *summary.quantiles]:
            np.testing.assert_array_equal(np.isnan(field), summary.invalid)
        np.testing.assert_allclose(summary.mean[:6], x.mean(0), rtol=1e-5)
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(summary.epistemic[:6], x.var(0).astype(np.float32), rtol=1e-5, atol=1e-37)
        np.testing.assert_array_equal(summary.quantiles[[0, 2], :6], [x.min(0), x.max(0)])
        assert (summary.log_likelihood[:2] == -np.inf).all()


@pytest.mark.parametrize("count", [1, 7, 1000, 46_341, 10**6, 123_456_789])
def test_ranks_are_exact(count):
    levels = np.array([0.0, 0.05, 0.07, 0.3, 0.5, 0.55, 0.9, 0.95, 1.0])
    want = [max(-(-round(level * 100) * count // 100), 1) for level in levels]
    assert [int(order._rank(level, jnp.int32(count))) for level in levels] == want


def test_probabilities_are_not_taken_for_logits(key):
    z = jax.random.normal(key, (5, 3))

    def logits(key):
        return 3 * z + jax.random.normal(key, (5, 3))

    def probabilities(key):
        return jax.nn.softmax(logits(key))

    expected = mc.classify(logits, key, 20)
    found = mc.classify(probabilities, key, 20, logits=False, chunk_size=6)
    for field, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(field, other, rtol=1e-4, atol=1e-6)
    narrow = mc.classify(lambda key: probabilities(key).astype(jnp.bfloat16), key, 20, logits=False)
    np.testing.assert_allclose(narrow.probabilities, expected.probabilities, atol=0.01)
    np.testing.assert_allclose(narrow.probabilities.sum(-1), 1, rtol=1e-6)
    with pytest.warns(UserWarning, match=r"classify: fn must return logits, .* pass logits=False") as caught:
        mc.classify(probabilities, key, 4)
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match=r"classify: fn must return probabilities .* got values from -.* logits=True"):
        mc.classify(logits, key, 4, logits=False)
    with pytest.raises(TypeError, match="classify: logits must be True or False, got 'no'"):
        mc.classify(logits, key, 4, logits="no")


@pytest.mark.parametrize(
    "rows", [[[0.0, 0.0], [0.0, 0.0]], [[0.5, 0.6], [0.5, 0.5]], [[1.5, -0.5]], [[1.0]], [[2.0, 3.0], [0.0, 1.0]]]
)
def test_logits_that_could_not_be_probabilities_do_not_warn(key, rows):
    mc.classify(lambda key: jnp.array(rows), key, 1)  # warnings are errors


def test_probabilities_that_are_none_are_flagged_under_jit(key):
    rows = jnp.array([[0.5, 0.5], [0.2, 0.5], [1.2, -0.2], [jnp.nan, 0.5], [0.0, 1.0], [jnp.inf, 0.0]])
    summary = jax.jit(lambda key: mc.classify(lambda key: rows, key, 1, logits=False))(key)
    np.testing.assert_array_equal(summary.invalid, [False, True, True, True, False, True])
    for field in summary[:4]:
        np.testing.assert_array_equal(np.isnan(field).reshape(6, -1).all(-1), summary.invalid)
    with pytest.warns(UserWarning, match="classify: fn returned probabilities that are NaN for 1 of 2 inputs"):
        mc.classify(lambda key: rows[3:5], key, 1, logits=False)


def fn(key):
    return jax.random.normal(key, (3,))


WRONG = {
    r"fn must be a function of one argument, a key, got one of \(\)": lambda call, key: call(lambda: 1.0, key),
    r"fn must be a function of one argument, a key, got one of \(key, x\)": lambda call, key: call(
        lambda key, x: x, key
    ),
    "fn must be a function of a key, got 3": lambda call, key: call(3, key),
    "fn must return arrays, got 'text'": lambda call, key: call(lambda key: "text", key),
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("name", ["sample", "classify", "regress", "explain"])
def test_functions_that_cannot_be_sampled(key, name, message):
    numbers = () if name == "explain" else (4,)
    with pytest.raises(TypeError, match=f"{name}: {message}"):
        WRONG[message](lambda fn, key: getattr(mc, name)(fn, key, *numbers), key)


@pytest.mark.parametrize("value", [10.0, True, "10", jnp.ones(2), 2**31, -1])
@pytest.mark.parametrize("summarise", [mc.sample, mc.classify, mc.regress])
def test_numbers_of_samples(key, summarise, value):
    with pytest.raises((TypeError, ValueError), match=f"{summarise.__name__}: num_samples must be "):
        summarise(fn, key, value)


def test_quantiles_that_are_no_numbers(key):
    with pytest.raises(TypeError, match="regress: quantiles must be a sequence of numbers, got 'half'"):
        mc.regress(fn, key, 4, quantiles="half")
    with pytest.raises(TypeError, match="regress: quantiles must be a sequence of numbers, got "):
        jax.jit(lambda q: mc.regress(fn, key, 4, quantiles=q))(jnp.ones(1))


@pytest.mark.parametrize("name", ["sample", "classify", "regress", "explain"])
def test_errors_of_flax_name_what_to_use(key, name):
    numbers = () if name == "explain" else (4,)
    summarise = getattr(mc, name)
    model, x = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
    with pytest.raises(Exception, match="trace level") as caught:
        summarise(lambda key: model(x), key, *numbers)
    assert any("dropjax.nnx.mc_view(model, key)" in note for note in caught.value.__notes__)
    plain = linen.Dropout(0.5, deterministic=False)
    with pytest.raises(Exception, match="dropout") as caught:
        summarise(lambda key: plain.apply({}, x), key, *numbers)
    assert any("dropjax.linen.mc_apply(model, variables, key, x)" in note for note in caught.value.__notes__)
