"""Dense layers with Gaussian noise on each weight, whose variance is learned: variational dropout."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Rate
from dropjax.functional.learned import learned, parameter

_CLIP = 8.0  # of log alpha, as in the code of Molchanov, Ashukha, Vetrov


@_arguments.public
def local_reparametrization(
    key: Array,
    x: ArrayLike,
    variance: ArrayLike,
    *,
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Draws activations of mean x and a variance that is learned, in place of the weights that they come from.

    y = x + sqrt(variance) n with n ~ N(0, 1): E[y] = x and Var[y] = variance. Where weights are independent normal
    variables, so are the activations of each example: drawing these gives gradients of less variance.

    Args:
      key: one JAX key; it is consumed.
      x: real float `[...]`, the means.
      variance: not negative: a number, or a float array that broadcasts against x. It is differentiated; at 0 its
        derivative counts as 0.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x; the noise is float32. NaN where a traced variance is NaN or negative.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> y = local_reparametrization(jax.random.key(0), jnp.ones(10_000), 0.25)
      >>> 0.48 < float(y.std()) < 0.52
      True

    Reference:
      Kingma, Salimans, Welling, [Variational dropout and the local reparameterization
      trick](https://arxiv.org/abs/1506.02557), 2015, section 2.
    """
    x = _checks.array("local_reparametrization", x, real=True)
    checked = parameter("local_reparametrization", "variance", variance, x.shape, "[0, inf)", masks.wide(x))
    draw = bits.draw("local_reparametrization", key, (x, checked), x.shape, start=start, sharded_dims=sharded_dims)
    return _local_reparametrization(draw, x, checked)


@functools.partial(masks.redrawn, prevent_cse=True)
def _local_reparametrization(draw: bits.Draw, mean: Array, variance: Rate) -> Array:
    v = learned(variance, masks.wide(mean))
    stddev = masks.nan_unless(v >= 0, jnp.where(v > 0, jnp.sqrt(jnp.where(v > 0, v, 1)), 0))
    return (mean.astype(v.dtype) + stddev * masks.normal(draw, mean.shape).astype(v.dtype)).astype(mean.dtype)


@_arguments.public
def variational_dense(
    key: Array,
    x: ArrayLike,
    kernel: ArrayLike,
    log_alpha: ArrayLike,
    *,
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Multiplies x by a kernel whose weights have multiplicative Gaussian noise of a variance that is learned.

    y = x W with W ~ N(kernel, alpha kernel^2), independent for each row of x and each weight, by local
    reparametrisation: y = x kernel + sqrt(x^2 (alpha kernel^2)) n with n ~ N(0, 1). Without noise it is x @ kernel.
    The loss is mean_i(-log likelihood_i) + KL / N with N the number of examples and KL the sum of
    `variational_dropout_kl(log_alpha)` over all weights, not only over all alphas.

    Args:
      key: one JAX key; it is consumed.
      x: real float `[..., features]`.
      kernel: real float `[features, outputs]`.
      log_alpha: log of the variance of the noise, in `[-inf, inf)`: a number, or a float array that broadcasts
        against the kernel, `[outputs]` or `[features, 1]` for units, `[features, outputs]` for weights.
      start: `{dim: index}`, where this piece of y starts in the whole; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each dimension of y that is cut. Where x's
        features are cut, add up x @ kernel and the variance first, and use `local_reparametrization`.

    Returns:
      Array `[..., outputs]` of the dtype of x; products are of float32 at least, and rounded once.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> y = variational_dense(jax.random.key(0), jnp.ones((10_000, 4)), jnp.ones((4, 1)), jnp.log(0.25))
      >>> 0.98 < float(y.std()) < 1.02
      True

    Reference:
      Kingma, Salimans, Welling, [Variational dropout and the local reparameterization
      trick](https://arxiv.org/abs/1506.02557), 2015, section 3.
    """
    x, means, log_alpha = _weights("variational_dense", x, kernel, "log_alpha", log_alpha)
    log_alpha = jnp.where(means == 0, 0, log_alpha)  # an alpha that overflows has no effect on a weight of 0
    mean, variance = _moments(x, means, jnp.exp(log_alpha) * jnp.square(means))
    draw = bits.draw("variational_dense", key, (mean, variance), mean.shape, start=start, sharded_dims=sharded_dims)
    return _local_reparametrization(draw, mean, variance).astype(x.dtype)


@_arguments.public
def sparse_variational_dense(
    key: Array,
    x: ArrayLike,
    kernel: ArrayLike,
    log_sigma2: ArrayLike,
    *,
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Multiplies x by a kernel with additive Gaussian noise on each weight, which drives most weights to 0.

    y = x W with W ~ N(kernel, sigma^2), independent for each row of x and each weight, by local reparametrisation:
    y = x kernel + sqrt(x^2 sigma^2) n with n ~ N(0, 1). It is `variational_dense` with log_alpha = log_sigma2 -
    log(kernel^2), in variables whose gradients have less variance. The loss is mean_i(-log likelihood_i) + KL / N with
    N the number of examples and KL the sum of `variational_dropout_kl(sparse_log_alpha(kernel, log_sigma2))`.
    Without noise it is x @ sparse_kernel(kernel, log_sigma2).

    Args:
      key: one JAX key; it is consumed.
      x: real float `[..., features]`.
      kernel: real float `[features, outputs]`, the means of the weights.
      log_sigma2: log of the variances of the weights, in `[-inf, inf)`; a number or array, broadcasts to the kernel.
      start: `{dim: index}`, where this piece of y starts in the whole; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each dimension of y that is cut. Where x's
        features are cut, add up x @ kernel and the variance first, and use `local_reparametrization`.

    Returns:
      Array `[..., outputs]` of the dtype of x; products are of float32 at least, and rounded once.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> y = sparse_variational_dense(jax.random.key(0), jnp.ones((10_000, 4)), jnp.zeros((4, 1)), jnp.log(0.25))
      >>> 0.98 < float(y.std()) < 1.02
      True

    Reference:
      Molchanov, Ashukha, Vetrov, [Variational dropout sparsifies deep neural
      networks](https://arxiv.org/abs/1701.05369), 2017.
    """
    x, means, log_sigma2 = _weights("sparse_variational_dense", x, kernel, "log_sigma2", log_sigma2)
    mean, variance = _moments(x, means, jnp.exp(log_sigma2))
    draw = bits.draw(
        "sparse_variational_dense", key, (mean, variance), mean.shape, start=start, sharded_dims=sharded_dims
    )
    return _local_reparametrization(draw, mean, variance).astype(x.dtype)


def _weights(
    function: str, x: ArrayLike, kernel: ArrayLike, argument: str, value: ArrayLike
) -> tuple[Array, Array, Array]:
    """Returns x, and the kernel and its parameter in the dtype in which products are taken."""
    x, kernel = _factors(function, x, kernel)
    return x, kernel, _parameter(function, argument, value, kernel.shape, kernel.dtype)


def without_noise(function: str, x: ArrayLike, kernel: ArrayLike) -> Array:
    """What a dense layer is in evaluation, checked and rounded as it is with noise."""
    x, kernel = _factors(function, x, kernel)
    return (x.astype(kernel.dtype) @ kernel).astype(x.dtype)


def _factors(function: str, x: ArrayLike, kernel: ArrayLike) -> tuple[Array, Array]:
    """Returns x, and the kernel in the dtype in which products are taken."""
    x = inputs(function, x)
    kernel = _checks.array(function, kernel, real=True, argument="kernel")
    if kernel.ndim != 2 or kernel.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{function}: kernel must be [features, outputs] for x of shape [..., features], got shape {kernel.shape} "
            f"for {x.shape}."
        )
    return x, kernel.astype(masks.wide(x))


def inputs(function: str, x: ArrayLike) -> Array:
    """Returns the inputs of a dense layer."""
    x = _checks.array(function, x, real=True)
    if x.ndim == 0:
        raise ValueError(f"{function}: x must have a dimension of features, got a scalar.")
    return x


def _parameter(function: str, argument: str, value: ArrayLike, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns a parameter of the weights, in a shape that broadcasts against theirs."""
    array = _checks.real(function, argument, value, "[-inf, inf)")  # -inf: no noise
    try:
        good = jnp.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        good = False
    if not good:
        raise ValueError(
            f"{function}: {argument} must broadcast against the kernel's shape {shape}, got shape {array.shape}."
        )
    return array.reshape((1,) * (len(shape) - array.ndim) + array.shape).astype(dtype)


@jax.jit
def _moments(x: Array, kernel: Array, variances: Array) -> tuple[Array, Array]:
    x = x.astype(kernel.dtype)
    return x @ kernel, jnp.square(x) @ jnp.broadcast_to(variances, kernel.shape)


@_arguments.public
def sparse_log_alpha(kernel: ArrayLike, log_sigma2: ArrayLike) -> Array:
    """Returns log alpha, how much noise a weight has for its size: log_sigma2 - log(kernel^2), within [-8, 8].

    Args:
      kernel: real float `[features, outputs]`, or of any other shape.
      log_sigma2: a number in `[-inf, inf)`, or a float array that broadcasts against the kernel.

    Returns:
      Array of the shape and dtype of the kernel. Where it is clipped its derivatives are 0.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> sparse_log_alpha(jnp.array([1.0, 0.1, 0.0]), -2.0)
      Array([-2.       ,  2.6051702,  8.       ], dtype=float32)

    Reference:
      Molchanov, Ashukha, Vetrov, [Variational dropout sparsifies deep neural
      networks](https://arxiv.org/abs/1701.05369), 2017. The limits are those of their code.
    """
    kernel, log_alpha = _log_alpha("sparse_log_alpha", kernel, log_sigma2)
    return log_alpha.astype(kernel.dtype)


def _log_alpha(function: str, kernel: ArrayLike, log_sigma2: ArrayLike) -> tuple[Array, Array]:
    """Returns the kernel and log alpha, float32 at least: what is compared with a threshold is not rounded before."""
    kernel = _checks.array(function, kernel, real=True, argument="kernel")
    wide = masks.wide(kernel)
    log_sigma2 = _parameter(function, "log_sigma2", log_sigma2, kernel.shape, wide)
    # a kernel that is 0, or whose inverse would overflow, counts as the least normal number
    size = jnp.maximum(jnp.abs(kernel.astype(wide)), jnp.finfo(wide).tiny)
    return kernel, jnp.clip(log_sigma2 - 2 * jnp.log(size), -_CLIP, _CLIP)


@_arguments.public
def sparse_kernel(kernel: ArrayLike, log_sigma2: ArrayLike, *, threshold: ArrayLike = 3.0) -> Array:
    """Returns the kernel without those weights that are mostly noise: 0 where log alpha is above the threshold.

    At log alpha = 3 a weight has 20 times as much variance as its square: it is dropped at a rate of 0.95.

    Args:
      kernel: real float `[features, outputs]`, or of any other shape.
      log_sigma2: a number in `[-inf, inf)`, or a float array that broadcasts against the kernel.
      threshold: log alpha above which a weight is 0.

    Returns:
      Array of the shape and dtype of the kernel.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> sparse_kernel(jnp.array([1.0, 0.1, 0.01]), -2.0)
      Array([1. , 0.1, 0. ], dtype=float32)

    Reference:
      Molchanov, Ashukha, Vetrov, [Variational dropout sparsifies deep neural
      networks](https://arxiv.org/abs/1701.05369), 2017.
    """
    kernel, log_alpha = _log_alpha("sparse_kernel", kernel, log_sigma2)
    return jnp.where(log_alpha > threshold, jnp.zeros_like(kernel), kernel)


@_arguments.public
def sparsity(kernel: ArrayLike, log_sigma2: ArrayLike, *, threshold: ArrayLike = 3.0) -> Array:
    """Returns the share of weights that `sparse_kernel` sets to 0.

    Args:
      kernel: real float `[features, outputs]`, or of any other shape with an element.
      log_sigma2: a number in `[-inf, inf)`, or a float array that broadcasts against the kernel.
      threshold: log alpha above which a weight is 0.

    Returns:
      float32 `[]` in `[0, 1]`; NaN for an empty kernel.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> sparsity(jnp.array([1.0, 0.1, 0.01, 0.001]), -2.0)
      Array(0.5, dtype=float32)
    """
    return (_log_alpha("sparsity", kernel, log_sigma2)[1] > threshold).mean(dtype=jnp.float32)
