"""One row per variant: its function, its layers, its theory and an oracle that is not our code.

A property that does not hold for a row stands in `not_for`, with the reason. What has no row is in OTHERS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import special

import dropjax
from tests import oracle


class Variant(NamedTuple):
    function: Callable[..., Any]
    layer: str  # the name of its class in dropjax.linen and dropjax.nnx
    oracle: Callable[..., Any]  # (key words, x, rate, options) -> y in NumPy
    moments: Callable[..., Any]  # (x, rate) -> mean, variance and fourth central moment of y
    exact: bool = True  # values bit-identical in every mode; else within 4 ulp of the largest term
    options: dict[str, Any] = {}  # noqa: RUF012  # rows are constants
    not_for: dict[str, str] = {}  # noqa: RUF012
    whole_rate: tuple[int, ...] | None = None  # the largest shape of a rate for SHAPE, where less than SHAPE


def two_points(high, low, q):
    """Moments of a variable that is high with probability q, else low."""
    gap = (high - low) ** 2
    spread = q * (1 - q)
    return q * high + (1 - q) * low, gap * spread, gap**2 * spread * (1 - 3 * spread)


def dropout_oracle(words, x, rate, options):
    kept = oracle.keep(words, x.shape, rate, options.get("broadcast_dims", ()))
    return np.where(kept, x * oracle.scale(rate), np.float32(0))


def spatial_oracle(words, x, rate, options):
    places = tuple(d for d in range(x.ndim) if d not in (0, options.get("channel_axis", -1) % x.ndim))
    return np.where(oracle.keep(words, x.shape, rate, places), x * oracle.scale(rate), np.float32(0))


def gaussian_oracle(words, x, rate, options):
    midpoint = ((oracle.words(words, x.shape) >> 8).astype(np.float64) + 0.5) / 2**24
    return x * (1 + np.sqrt(rate / (1 - rate)) * special.ndtri(midpoint))


def gaussian_moments(x, rate):
    variance = x**2 * rate / (1 - rate)
    return x, variance, 3 * variance**2


def keras_alpha(rate):
    """a and b as Keras's AlphaDropout writes them."""
    alpha_p = -1.6732632423543772848170429916717 * 1.0507009873554804934193349852946
    a = ((1 - rate) * (1 + rate * alpha_p**2)) ** -0.5
    return a, -a * alpha_p * rate, alpha_p


def alpha_oracle(words, x, rate, options):
    a, b, alpha_p = keras_alpha(rate)
    return a * np.where(oracle.keep(words, x.shape, rate), x, alpha_p) + b


def alpha_moments(x, rate):
    a, b, alpha_p = keras_alpha(rate)
    return two_points(a * x + b, a * alpha_p + b, 1 - rate)


def dropout_moments(x, rate):
    return two_points(x / (1 - rate), 0 * x, 1 - rate)


def noise_oracle(words, x, rate, options):
    midpoint = ((oracle.words(words, x.shape) >> 8).astype(np.float64) + 0.5) / 2**24
    return x + rate * special.ndtri(midpoint)


def noise_moments(x, rate):
    return x, rate**2 + 0 * x, 3 * rate**4 + 0 * x


def uniform_oracle(words, x, rate, options):
    midpoint = ((oracle.words(words, x.shape) >> 8).astype(np.float64) + 0.5) / 2**24
    return x * (1 + rate * (2 * midpoint - 1))


def uniform_moments(x, rate):
    return x, x**2 * rate**2 / 3, x**4 * rate**4 / 5


def feature_alpha_oracle(words, x, rate, options):
    a, b, alpha_p = keras_alpha(rate)
    return a * np.where(oracle.keep(words, x.shape, rate, (1,)), x, alpha_p) + b


def drop_path_oracle(words, x, rate, options):
    """timm's and torchvision's formula: a Bernoulli variable for each row, or one for all, and the division."""
    shared = range(x.ndim) if options.get("mode") == "batch" else range(1, x.ndim)
    scale = oracle.scale(rate) if options.get("scale", True) else np.float32(1)
    return np.where(oracle.keep(words, x.shape, rate, tuple(shared)), x * scale, np.float32(0))


def unscaled_moments(x, rate):
    return two_points(x, 0 * x, 1 - rate)


def embedding_oracle(words, x, rate, options):
    rows = options.get("indices", np.arange(x.shape[0]))
    table = oracle.keep(words, (int(np.max(rows)) + 1, *[1] * (x.ndim - np.ndim(rows))), rate)
    return np.where(table[np.asarray(rows)], x * oracle.scale(rate), np.float32(0))


def mask_feature_oracle(words, x, rate, options):
    """PyG's formula for rows: masked features are filled with 0, the others stay."""
    return np.where(oracle.keep(words, x.shape, rate, tuple(range(1, x.ndim))), x, np.float32(0))


def drop_head_oracle(words, x, rate, options):
    """The paper's formula: the number of heads over the number of those that are kept."""
    kept = oracle.keep(words, x.shape, rate, (2,))
    count = kept.sum(1, keepdims=True)
    return np.where(kept, x * (x.shape[1] / np.maximum(count, 1)), 0)


def drop_head_moments(x, rate):
    """Sums over the number k of the kept ones, which is binomial; m is 1 in k / H of the cases."""
    heads, q = x.shape[1], 1 - rate
    k = np.arange(1, heads + 1)
    chance = special.comb(heads, k) * q**k * rate ** (heads - k)
    first, second, third, fourth = (x**n * (chance * heads ** (n - 1.0) / k ** (n - 1.0)).sum() for n in (1, 2, 3, 4))
    central = fourth - 4 * third * first + 6 * second * first**2 - 3 * first**4
    return first, second - first**2, central


def drop_block_oracle(words, x, rate, options):
    """Loops over the places of a [batch, length, channels] map and the seeds of the blocks that cover them."""
    size = options.get("block_size", 7)
    seeds = oracle.words(words, (x.shape[0], x.shape[1] + size - 1, x.shape[2]))
    gamma = 1 - (1 - rate) ** (1 / size)
    kept = [[(seeds[b, i : i + size] >= gamma * 2**32).all(0) for i in range(x.shape[1])] for b in range(len(x))]
    return np.where(np.reshape(kept, x.shape), x * oracle.scale(rate), np.float32(0))


def targeted_oracle(words, x, rate, options):
    """All are candidates; tests/test_targeted.py has the others."""
    return np.where(oracle.keep(words, x.shape, rate), x * oracle.scale(rate), np.float32(0))


VARIANTS = {
    "dropout": Variant(dropjax.dropout, "Dropout", dropout_oracle, dropout_moments),
    "dropout_shared": Variant(
        dropjax.dropout,
        "Dropout",
        dropout_oracle,
        dropout_moments,
        options={"broadcast_dims": (1,)},
    ),
    "spatial_dropout": Variant(
        dropjax.spatial_dropout,
        "SpatialDropout",
        spatial_oracle,
        dropout_moments,
        not_for={"scalar": "a channel axis needs a dimension"},
        whole_rate=(5, 1, 6),
    ),
    "spatial_dropout_channels_first": Variant(
        dropjax.spatial_dropout,
        "SpatialDropout",
        spatial_oracle,
        dropout_moments,
        options={"channel_axis": 1},
        not_for={"scalar": "a channel axis needs a dimension"},
        whole_rate=(5, 4, 1),
    ),
    "gaussian_dropout": Variant(
        dropjax.gaussian_dropout,
        "GaussianDropout",
        gaussian_oracle,
        gaussian_moments,
        exact=False,
        not_for={"rate_one": "its variance is infinite at rate 1, which is an error"},
    ),
    "alpha_dropout": Variant(
        dropjax.alpha_dropout,
        "AlphaDropout",
        alpha_oracle,
        alpha_moments,
        exact=False,
        not_for={
            "complex": "SELU's saturation value is real",
            "linear": "what is dropped becomes a constant, not 0",
        },
    ),
    "feature_alpha_dropout": Variant(
        dropjax.feature_alpha_dropout,
        "FeatureAlphaDropout",
        feature_alpha_oracle,
        alpha_moments,
        exact=False,
        not_for={
            "complex": "SELU's saturation value is real",
            "linear": "what is dropped becomes a constant, not 0",
            "scalar": "a channel axis needs a dimension",
        },
        whole_rate=(5, 1, 6),
    ),
    "gaussian_noise": Variant(
        dropjax.gaussian_noise,
        "GaussianNoise",
        noise_oracle,
        noise_moments,
        exact=False,
        not_for={
            "complex": "the noise is real, and is added",
            "linear": "the noise is added",
            "rate_one": "a standard deviation of 1 drops nothing",
            "range": "a standard deviation may be above 1",
            "residuals": "its derivative is 1: nothing is kept at all",
        },
    ),
    "uniform_dropout": Variant(
        dropjax.uniform_dropout,
        "UniformDropout",
        uniform_oracle,
        uniform_moments,
        exact=False,
        not_for={"rate_one": "noise in (0, 2) drops nothing"},
    ),
    "drop_path": Variant(
        dropjax.drop_path,
        "DropPath",
        drop_path_oracle,
        dropout_moments,
        not_for={"scalar": "a batch axis needs a dimension"},
        whole_rate=(5, 1, 1),
    ),
    "drop_path_of_the_batch_without_scale": Variant(
        dropjax.drop_path,
        "DropPath",
        drop_path_oracle,
        unscaled_moments,
        options={"mode": "batch", "scale": False},
        not_for={"scalar": "a batch axis needs a dimension", "scale": "without scale what is kept is not divided"},
        whole_rate=(1, 1, 1),
    ),
    "drop_connect": Variant(dropjax.drop_connect, "DropConnect", dropout_oracle, dropout_moments),
    "embedding_dropout": Variant(
        dropjax.embedding_dropout,
        "EmbeddingDropout",
        embedding_oracle,
        dropout_moments,
        not_for={"scalar": "a table has a dimension of its vocabulary"},
        whole_rate=(5, 1, 1),
    ),
    "mask_feature": Variant(
        dropjax.mask_feature,
        "MaskFeature",
        mask_feature_oracle,
        unscaled_moments,
        not_for={
            "scalar": "features or nodes need a dimension",
            "scale": "masked features are not made up for",
        },
        options={"mode": "row"},
        whole_rate=(5, 1, 1),
    ),
    "drop_head": Variant(
        dropjax.drop_head,
        "DropHead",
        drop_head_oracle,
        drop_head_moments,
        exact=False,
        not_for={
            "scalar": "the heads need a dimension",
            "dim 1": "heads are scaled by how many of all of them are kept",
        },
        whole_rate=(5, 1, 1),
    ),
    "drop_block": Variant(
        dropjax.drop_block,
        "DropBlock",
        drop_block_oracle,
        dropout_moments,
        options={"block_size": 3},
        not_for={"scalar": "a channel axis needs a dimension"},
        whole_rate=(5, 1, 6),
    ),
    "targeted_dropout_of_all": Variant(
        dropjax.targeted_dropout,
        "TargetedDropout",
        targeted_oracle,
        dropout_moments,
        options={"targeted": 1.0, "rescale": True},
        not_for={"scalar": "units need a dimension"},
    ),
}

OTHERS = {
    "keep_mask": "it draws a mask of a shape, and takes no x",
    "apply_mask": "it draws nothing, and takes no key",
    "token_dropout": "its rate makes a length, may be left out for num_keep, and the result is shorter than x",
    "standout": "it takes a logit for each element in the place of a rate",
    "standout_expectation": "it draws nothing, and takes no key",
    "drop_edge": "it takes the nodes of edges, integers, and gives a mask",
    "drop_node": "it takes the nodes of edges, integers, and gives masks",
    "layer_drop": "it drops a function, which is then not computed: layer_drop(key, fn, x, rate)",
    "weight_drop": "it drops arrays of a pytree, which it must be told by name",
    "masksembles_masks": "it draws fixed masks of an exact number of features once, by sizes and a scale",
    "masksembles": "its masks are fixed and given: it draws nothing",
    "masksembles_samples": "it runs a function for all fixed masks, and draws nothing",
    "multi_sample_dropout": "it applies a head to several draws of dropout",
    "r_drop": "a loss: it compares two draws of a function",
    "symmetric_kl": "a loss: it draws nothing",
    "concrete_dropout": "its rate is a logit, and is differentiated",
    "concrete_dropout_kl": "it is a term of the loss, and draws nothing",
    "variational_gaussian_dropout": "its noise is given as log_alpha, and is differentiated",
    "variational_dropout_kl": "it is a term of the loss, and draws nothing",
    "local_reparametrization": "its noise is given as a variance, and is differentiated",
    "variational_dense": "it is a product with a noisy kernel, and its log_alpha is differentiated",
    "sparse_variational_dense": "it is a product with a noisy kernel, and its log_sigma2 is differentiated",
    "sparse_log_alpha": "it tells how noisy weights are, and draws nothing",
    "sparse_kernel": "it sets noisy weights to 0, and draws nothing",
    "sparsity": "it counts noisy weights, and draws nothing",
}
"""Exported functions that are not of the form f(key, x, rate, ...): why. Their tests have files of their own."""

OTHER_LAYERS = {
    "Standout": "it takes a logit for each element",
    "TokenDropout": "what it returns is shorter than its inputs",
    "ConcreteDropout": "its rate is a parameter",
    "VariationalGaussianDropout": "its noise is a parameter",
    "VariationalDense": "it has a kernel of its own",
    "SparseVariationalDense": "it has a kernel of its own",
}
"""Layers that are no fields and a function: why. Their tests have files of their own."""
