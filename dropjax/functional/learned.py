"""Dropout of activations whose rate is learned: noise with a derivative by its rate."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Fixed, Rate


@_arguments.public
def concrete_dropout(
    key: Array,
    x: ArrayLike,
    rate_logit: ArrayLike,
    *,
    temperature: ArrayLike = 0.1,
    broadcast_dims: Sequence[int] = (),
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Drops elements softly, with a rate p that is learned: the output has a derivative by the rate's logit.

    y = x (1 - z) / (1 - p) with p = sigmoid(rate_logit), z = sigmoid((logit p + logit u) / temperature) and u
    uniform in (0, 1): z is close to 0 or 1, and is above 1/2 with probability p. At a low temperature E[z] is close
    to p, and E[y] to x: at 0.1, within 1.2 % up to p = 0.9. At a higher one z moves
    towards 1/2. To not drop, do not call.

    By itself the data would drive the rate to 0: add `concrete_dropout_kl` to the loss.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex `[...]`.
      rate_logit: log(p / (1 - p)) of the probability p of dropping, in `[-inf, inf]`: a number, or a float array
        that broadcasts against x (one rate, or one per feature). It is differentiated.
      temperature: in `(0, 1]`: a number, or a float array that broadcasts against x. It is not differentiated.
      broadcast_dims: dimensions along which the mask is shared; the places of an image, to drop whole channels.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x. NaN where rate_logit is NaN or a traced temperature is not in `(0, 1]`.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> size = lambda logit: (concrete_dropout(jax.random.key(0), jnp.ones(10_000), logit) ** 2).mean()
      >>> value, slope = jax.value_and_grad(size)(jnp.log(0.2 / 0.8))  # 1 / (1 - p) would be 1.25, its slope 0.25
      >>> 1.2 < float(value) < 1.25 and float(slope) > 0
      True

    Reference:
      Gal, Hron, Kendall, [Concrete dropout](https://arxiv.org/abs/1705.07832), 2017. Words of 24 bits keep u away
      from 0 and 1, where the paper's code adds 1e-7.
    """
    x = _checks.array("concrete_dropout", x)
    logit = parameter("concrete_dropout", "rate_logit", rate_logit, x.shape, "[-inf, inf]", masks.wide(x))
    warmth = _checks.rate("concrete_dropout", temperature, x.shape, argument="temperature")
    draw = bits.draw(
        "concrete_dropout", key, (x, logit, warmth), x.shape,
        shared=broadcast_dims, start=start, sharded_dims=sharded_dims,
    )  # fmt: skip
    return _concrete_dropout(draw, x, logit, warmth)


@functools.partial(masks.redrawn, prevent_cse=True)
def _concrete_dropout(draw: bits.Draw, x: Array, rate_logit: Rate, temperature: Rate) -> Array:
    wide = masks.wide(x)
    t = masks.number(temperature).astype(wide)
    logit = jnp.clip(learned(rate_logit, wide), -1000, 1000)  # infinities, too, have a value and a slope
    noise = masks.uniform(draw, x.shape).astype(wide)  # 2 u - 1
    z_logit = (logit + jnp.log1p(noise) - jnp.log1p(-noise)) / masks.nan_unless((t > 0) & (t <= 1), t)
    # log((1 - z) / (1 - p)), which neither underflows nor divides by 0
    return masks.times(x, jnp.exp(jax.nn.softplus(logit) - jax.nn.softplus(z_logit)))


@_arguments.public
def variational_gaussian_dropout(
    key: Array,
    x: ArrayLike,
    log_alpha: ArrayLike,
    *,
    broadcast_dims: Sequence[int] = (),
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Multiplies each element by Gaussian noise of mean 1 and a variance alpha that is learned.

    y = x (1 + sqrt(alpha) n) with n ~ N(0, 1): E[y] = x and Var[y] = alpha x^2. An alpha of r / (1 - r) is
    `gaussian_dropout` of rate r. By itself the data would drive alpha to 0: add `variational_dropout_kl` to the loss.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex `[...]`.
      log_alpha: log of the variance of the noise, in `[-inf, inf)`: a number, or a float array that broadcasts
        against x (one per layer, per unit). It is differentiated.
      broadcast_dims: dimensions along which the noise is shared; negatives count from the end.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x; the noise is float32. NaN where log_alpha is NaN.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> y = variational_gaussian_dropout(jax.random.key(0), jnp.ones(10_000), jnp.log(0.25))
      >>> 0.48 < float(y.std()) < 0.52
      True

    Reference:
      Kingma, Salimans, Welling, [Variational dropout and the local reparameterization
      trick](https://arxiv.org/abs/1506.02557), 2015, section 3. The paper holds alpha at or below 1.
    """
    x = _checks.array("variational_gaussian_dropout", x)
    checked = parameter("variational_gaussian_dropout", "log_alpha", log_alpha, x.shape, "[-inf, inf)", masks.wide(x))
    draw = bits.draw(
        "variational_gaussian_dropout", key, (x, checked), x.shape,
        shared=broadcast_dims, start=start, sharded_dims=sharded_dims,
    )  # fmt: skip
    return _variational_gaussian_dropout(draw, x, checked)


@functools.partial(masks.redrawn, prevent_cse=True)
def _variational_gaussian_dropout(draw: bits.Draw, x: Array, log_alpha: Rate) -> Array:
    wide = masks.wide(x)
    return masks.times(x, 1 + jnp.exp(learned(log_alpha, wide) / 2) * masks.normal(draw, x.shape).astype(wide))


def parameter(function: str, argument: str, value: Any, shape: tuple[int, ...], range: str, dtype: Any) -> Rate:
    """Checks what is learned as a rate is checked, and returns it with the precision that its gradient needs."""
    _checks.real(function, argument, value)
    checked = _checks.rate(function, value, shape, argument=argument, range=range)
    return checked if isinstance(checked, Fixed) else jnp.asarray(value).astype(dtype).reshape(checked.shape)


def learned(parameter: Rate, dtype: Any) -> Array:
    """The value of a checked parameter, which is differentiated."""
    return jnp.asarray(parameter.value if isinstance(parameter, Fixed) else parameter, dtype)


def logits(function: str, rate: ArrayLike, shape: int | Sequence[int]) -> Array:
    """The first value of a `rate_logit`, float32 `[*shape]`."""
    first = _checks.rate(function, rate, (), argument="initial_rate", range="(0, 1)")
    return jnp.full(_checks.shape(function, shape), jax.scipy.special.logit(learned(first, jnp.float32)))


def log_variances(function: str, argument: str, value: ArrayLike, shape: int | Sequence[int]) -> Array:
    """The first value of a `log_alpha` or `log_sigma2`, float32 `[*shape]`."""
    first = _checks.real(function, argument, value, "(-inf, inf)")
    if first.ndim:
        raise ValueError(f"{function}: {argument} must be one number, got {_checks.describe(value)}.")
    return jnp.full(_checks.shape(function, shape), first, jnp.float32)


def noise(function: str, argument: str, value: ArrayLike, per: str, shape: tuple[int, int]) -> Array:
    """The first value of the noise of a kernel's weights, float32: one for each weight, unit or layer."""
    shapes = {"weight": shape, "unit": (shape[0], 1), "layer": ()}
    if per not in shapes:
        raise ValueError(f"{function}: per must be one of {tuple(shapes)}, got {_checks.describe(per)}.")
    return log_variances(function, argument, value, shapes[per])
