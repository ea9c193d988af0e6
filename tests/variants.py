"""One row per variant: its function, its layers, its theory and an oracle that is not our code.

A property that does not hold for a row stands in `not_for`, with the reason.
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
    ),
    "spatial_dropout_channels_first": Variant(
        dropjax.spatial_dropout,
        "SpatialDropout",
        spatial_oracle,
        dropout_moments,
        options={"channel_axis": 1},
        not_for={"scalar": "a channel axis needs a dimension"},
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
}
