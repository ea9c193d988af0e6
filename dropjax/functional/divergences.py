"""Divergences from the prior, which learned rates add to the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, masks
from dropjax._checks import Rate
from dropjax.functional.learned import learned, parameter

_SURE = 40.0  # a logit at which the rate is 0 or 1 to the precision of float64
_CUBIC = (1.16145124, -1.50204118, 0.58629921)  # Kingma, Salimans, Welling 2015
_SIGMOID = (0.63576, 1.87320, 1.48695)  # Molchanov, Ashukha, Vetrov 2017


@_arguments.public
def concrete_dropout_kl(rate_logit: ArrayLike, kernel: ArrayLike, *, length_scale: ArrayLike = 1.0) -> Array:
    """Divergence of a layer's dropped weights from their prior: what `concrete_dropout` adds to the loss.

    KL = length_scale^2 / 2 sum_k ||w_k||^2 / (1 - p_k) - sum_k H(p_k) + const, over the features k that are dropped;
    w_k are the weights of feature k, p_k its rate, H(p) = -p log p - (1 - p) log(1 - p).

    The loss is mean_i(-log likelihood_i) + sum_layers KL / N, with N the number of examples. With squared errors of
    a Gaussian of precision tau, mean_i(-log likelihood_i) = tau / 2 mean_i (y_i - f_i)^2. Divided by tau / 2 this is
    the loss of the paper's code, which adds to the mean squared error weight_regularizer ||W||^2 / (1 - p) and
    -dropout_regularizer K H(p) for K features: weight_regularizer = length_scale^2 / (tau N), and
    dropout_regularizer = 2 / (tau N).

    Args:
      rate_logit: log(p / (1 - p)), a number, or float `[]` or `[features]`.
      kernel: float `[..., features, outputs]` of the dense layer or convolution that takes what was dropped.
      length_scale: of the prior N(0, 1 / length_scale^2) of each weight; a number, or a float array `[]`.

    Returns:
      float32 `[]`, float64 for such a kernel. Logits count as at most 40 in size: finite, also at rates of 0 and 1.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> concrete_dropout_kl(0.0, jnp.ones((2, 3)))  # 6 - 2 log 2
      Array(4.6137056, dtype=float32)

    Reference:
      Gal, Hron, Kendall, [Concrete dropout](https://arxiv.org/abs/1705.07832), 2017. There the weights M are those of
      kept features, w / (1 - p) here, so that the first term reads (1 - p) ||M||^2.
    """
    weights = _checks.array("concrete_dropout_kl", kernel, real=True, argument="kernel")
    if weights.ndim < 2:
        raise ValueError(
            f"concrete_dropout_kl: kernel must be [..., features, outputs], got {_checks.describe(weights)}."
        )
    wide, features = masks.wide(weights), weights.shape[-2]
    logit = parameter("concrete_dropout_kl", "rate_logit", rate_logit, (features,), "[-inf, inf]", wide)
    length = _checks.rate("concrete_dropout_kl", length_scale, (), argument="length_scale")
    return _concrete_dropout_kl(logit, weights, learned(length, wide))


@jax.jit
def _concrete_dropout_kl(rate_logit: Rate, kernel: Array, length_scale: Array) -> Array:
    wide = masks.wide(kernel)
    logit = jnp.clip(learned(rate_logit, wide), -_SURE, _SURE)
    p = jax.nn.sigmoid(logit)
    entropy = p * jax.nn.softplus(-logit) + (1 - p) * jax.nn.softplus(logit)
    sizes = jnp.square(kernel.astype(wide)).sum((*range(kernel.ndim - 2), -1))
    return (length_scale**2 / 2 * sizes * (1 + jnp.exp(logit)) - entropy).sum()  # 1 / (1 - p) = 1 + exp(logit)


@_arguments.public
def variational_dropout_kl(log_alpha: ArrayLike, *, approximation: str = "sigmoid") -> Array:
    """Divergence of a weight with noise of variance alpha from the log-uniform prior: what is added to the loss.

    KL(alpha) = E log|1 + sqrt(alpha) n| - log(alpha) / 2 + (log 2 + Euler's gamma) / 2 with n ~ N(0, 1), which does
    not depend on the weight's size; it falls in alpha, to 0. The prior is improper and gives KL up to a
    constant: here it is 0 where alpha is infinite. With the sigmoid s,

        "sigmoid": 0.63576 - 0.63576 s(1.87320 + 1.48695 log alpha) + log(1 + 1 / alpha) / 2, within 0.0095 of it,
        "cubic":   0.63518 - log(alpha) / 2 - 1.16145124 alpha + 1.50204118 alpha^2 - 0.58629921 alpha^3, within 0.041.

    Args:
      log_alpha: a number, or a float array `[...]`, in `[-inf, inf]`; not above 0 for `"cubic"`.
      approximation: `"sigmoid"`, for every alpha, or `"cubic"`, of the first paper, for alpha up to 1.

    Returns:
      float32 `[...]`, float64 for such a log_alpha: the KL of one weight each. An alpha that several weights share
      counts for each of them. NaN where a traced log_alpha is above 0 and the approximation is `"cubic"`.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> variational_dropout_kl(jnp.array([-3.0, 0.0, 3.0])).round(2)
      Array([2.12      , 0.42999998, 0.03      ], dtype=float32)

    Reference:
      Kingma, Salimans, Welling, [Variational dropout and the local reparameterization
      trick](https://arxiv.org/abs/1506.02557), 2015, `"cubic"`. Molchanov, Ashukha, Vetrov, [Variational
      dropout sparsifies deep neural networks](https://arxiv.org/abs/1701.05369), 2017, `"sigmoid"`.
    """
    values = _checks.real("variational_dropout_kl", "log_alpha", log_alpha, "[-inf, inf]")
    if approximation not in ("sigmoid", "cubic"):
        raise ValueError(
            f"variational_dropout_kl: approximation must be 'sigmoid' or 'cubic', got "
            f"{_checks.describe(approximation)}."
        )
    if approximation == "cubic" and not _checks.is_traced(values) and (values > 0).any():
        raise ValueError(
            f"variational_dropout_kl: log_alpha must not be above 0 for the approximation 'cubic', got {values.max()}. "
            "Use 'sigmoid', or clip it, as the paper does."
        )
    return _kl(values.astype(masks.wide(values)), approximation)


@functools.partial(jax.jit, static_argnums=1)
def _kl(log_alpha: Array, approximation: str) -> Array:
    if approximation == "cubic":
        a = masks.nan_unless(~(log_alpha > 0), jnp.exp(log_alpha))
        c1, c2, c3 = _CUBIC
        return float(np.euler_gamma + np.log(2)) / 2 - log_alpha / 2 - a * (c1 + a * (c2 + a * c3))
    k1, k2, k3 = _SIGMOID
    return k1 * jax.nn.sigmoid(-(k2 + k3 * log_alpha)) + jax.nn.softplus(-log_alpha) / 2
