"""Statistics of masks at any rate: `python -m benchmarks.mask_quality masks`.

A stack of masks is a bool array `[masks, rows, columns]`, True = dropped. Sums are standardised by their exact
mean and variance (the products that correlations are made of are uncorrelated) and have normal tails, which
for skewed ones are short of the true: by a factor of 10 at p = 1e-6 in the worst case that is let through.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import dropjax

Masks = np.ndarray
PValues = dict[str, float]
LAGS = (1, 2, 3, 4, 8, 16, 32, 64)


def two_sided(z: float | np.ndarray) -> float:
    """The p-value of a normal deviate; of several, their least times their number."""
    z = np.atleast_1d(z)
    return float(min(1.0, z.size * 2 * stats.norm.sf(np.abs(z).max())))


def dispersion(totals: np.ndarray, n: int, rate: float) -> float:
    """Whether totals of n drops each vary as binomial ones: the sum of their squared deviates."""
    npq = n * rate * (1 - rate)
    squares = (totals - n * rate) ** 2 / npq
    variance = 2 + (1 - 6 * rate * (1 - rate)) / npq  # from the fourth moment of the binomial
    return two_sided((squares.sum() - squares.size) / np.sqrt(squares.size * variance))


def totals(dropped: Masks, rate: float) -> PValues:
    """Drops in all, in each row, in each column, in each 8 x 8 tile."""
    k, r, c = dropped.shape
    tiles = dropped[:, : r // 8 * 8, : c // 8 * 8].reshape(k, r // 8, 8, c // 8, 8).sum((2, 4))
    mean = (dropped.sum() - dropped.size * rate) / np.sqrt(dropped.size * rate * (1 - rate))
    return {
        "total": two_sided(mean),
        "rows": dispersion(dropped.sum(2), c, rate),
        "columns": dispersion(dropped.sum(1), r, rate),
        "places": dispersion(dropped.sum(0), k, rate),
        "8 x 8 tiles": dispersion(tiles, 64, rate),
    }


def autocorrelation(dropped: Masks, rate: float) -> PValues:
    """Products of centred neighbours at some lags, along each axis."""
    centred = dropped.astype(np.float32) - np.float32(rate)
    result = {}
    for axis, name in enumerate(["masks", "rows", "columns"]):
        lags = [lag for lag in LAGS if lag < dropped.shape[axis]]
        along = np.moveaxis(centred, axis, 0)
        deviates = []
        for lag in lags:
            products = np.einsum("ijk,ijk->i", along[lag:], along[:-lag], dtype=np.float64)
            n = along[lag:].size
            deviates.append(products.sum() / (np.sqrt(n) * rate * (1 - rate)))
        result[f"lags along {name}"] = two_sided(np.array(deviates))
    return result


def agreement(dropped: Masks, rate: float) -> PValues:
    """The centred inner products of all pairs of masks, and of all pairs of rows of the first masks."""
    result = {}
    flat = dropped.reshape(len(dropped), -1)[:256]
    for name, lines in {"pairs of masks": flat, "pairs of rows": dropped[0]}.items():
        if len(lines) == 1:
            continue
        centred = (lines - np.float32(rate)) / np.float32(np.sqrt(rate * (1 - rate)))
        n = centred.shape[1]
        z = (centred @ centred.T)[np.triu_indices(len(lines), 1)].astype(np.float64) / np.sqrt(n)
        fourth = 1 / (rate * (1 - rate)) - 3  # moment of one centred drop; that of a product is its square
        shared = 2 * (len(lines) - 2) * (fourth - 1) / n  # two pairs with a common line vary with its drops
        variance = 2 + (fourth**2 - 3) / n + shared
        if n * min(rate, 1 - rate) ** 2 > 160:
            result[f"{name}, largest"] = two_sided(z)
        result[f"{name}, all"] = two_sided(((z**2).sum() - z.size) / np.sqrt(z.size * variance))
    return result


def neighbours(dropped: Masks, rate: float) -> PValues:
    """Contingency of pairs and quads of neighbours, along columns and along rows."""
    result = {}
    for direction, array in {"columns": dropped, "rows": np.swapaxes(dropped, 1, 2)}.items():
        for size, name in {2: "pairs", 4: "quads"}.items():
            groups = array[..., : array.shape[-1] // size * size].reshape(-1, size)
            counts = np.bincount(groups @ (1 << np.arange(size)), minlength=2**size)
            drops = np.array([bin(cell).count("1") for cell in range(2**size)])
            expected = len(groups) * rate**drops * (1 - rate) ** (size - drops)
            statistic, freedom = ((counts - expected) ** 2 / expected).sum(), 2**size - 1
            p = 2 * min(stats.chi2.sf(statistic, freedom), stats.chi2.cdf(statistic, freedom))
            if np.min(expected) > 5:
                result[f"{name} along {direction}"] = float(p)
    return result


def shared_words(words: np.ndarray) -> float:
    """Whether pairs of lines of words `[lines, n]` share two or more words: so rarely that their number is Poisson.

    Where only one word of a row enters its columns, two rows that share a word share many.
    """
    lines, n = words.shape
    line = np.repeat(np.arange(lines), n)
    order = np.argsort(words, axis=None, kind="stable")
    value, line = words.ravel()[order], line[order]
    twice = (value[1:] == value[:-1]) & (line[1:] != line[:-1])
    pairs = np.sort(np.stack([line[1:][twice], line[:-1][twice]], 1), 1)
    several = (np.unique(pairs, axis=0, return_counts=True)[1] > 1).sum() if len(pairs) else 0
    expected = lines * (lines - 1) / 2 * (n**2 / 2**32) ** 2 / 2
    return float(stats.poisson.sf(several - 1, expected))


STATISTICS: list[Callable[[Masks, float], PValues]] = [totals, autocorrelation, agreement, neighbours]


def p_values(dropped: Masks, rate: float) -> PValues:
    """All statistics of a stack of masks."""
    return {name: p for statistic in STATISTICS for name, p in statistic(dropped, float(np.float32(rate))).items()}


def over_keys(seed: int, rate: float, shape: tuple[int, ...] = (64, 1024, 1024)) -> Masks:
    """Masks of the keys fold_in(key, 0), fold_in(key, 1), ..."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(shape[0]))
    return ~np.asarray(jax.jit(jax.vmap(lambda key: dropjax.keep_mask(key, shape[1:], rate)))(keys))


def of_training(seed: int, rate: float, steps: int = 1000) -> Masks:
    """The masks that a training run really applied: the zeros of dropout's outputs, step by step.

    A network of one hidden layer of 256 sigmoid units, which are never zero, learns the digits.
    """
    import optax
    from sklearn.datasets import load_digits

    from dropjax import training

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    seen: dict[int, np.ndarray] = {}

    def loss(weights: tuple[jax.Array, jax.Array], batch: tuple[jax.Array, ...], key: jax.Array) -> jax.Array:
        x, y, step = batch
        hidden = dropjax.dropout(key, jax.nn.sigmoid(x @ weights[0]), rate)
        jax.debug.callback(lambda step, zero: seen.__setitem__(int(step), np.array(zero)), step, hidden == 0)
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ weights[1], y).mean()

    def data(step: int) -> tuple[np.ndarray, ...]:
        chosen = np.random.default_rng(step).choice(len(images), 64)
        return images[chosen], labels[chosen], np.asarray(step)

    weights = (0.1 * jax.random.normal(jax.random.key(1), (64, 256)), jnp.zeros((256, 10)))
    training.fit(loss, weights, optax.adam(1e-3), data, seed=seed, steps=steps)
    jax.effects_barrier()
    return np.stack([seen[step] for step in range(steps)])


def runs(seed: int) -> Iterator[tuple[str, float, Masks]]:
    """Every stack that the command looks at: its name, rate and masks."""
    for rate in [0.01, 0.1, 0.25, 0.5, 0.9]:
        yield "keys", rate, over_keys(seed, rate)
    for rate in [0.1, 0.5]:
        yield "a training run of 1,000 steps", rate, of_training(seed, rate)
