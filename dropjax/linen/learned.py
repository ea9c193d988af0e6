"""The Linen layers with parameters of their own: learned rates, and dense layers with noise on their weights.

The dense layers put their divergence from the prior, `kl`, into the collection `"losses"`, where it is mutable:

    y, changed = model.apply(variables, x, rngs=..., mutable=["losses"])
    loss = ... + sum(jax.tree.leaves(changed["losses"])) / number_of_examples
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dropjax import _layers, sharding
from dropjax.functional import divergences, learned, variational
from dropjax.linen.base import Layer, key_from_stream

__all__ = ["ConcreteDropout", "SparseVariationalDense", "VariationalDense", "VariationalGaussianDropout"]


class ConcreteDropout(Layer):
    """`dropjax.concrete_dropout` as a layer: the logit of its rate is the parameter `rate_logit`.

    Add `dropjax.concrete_dropout_kl(rate_logit, kernel) / N` to the loss, with the kernel of the layer that follows.

    Attributes:
      initial_rate: in `(0, 1)`.
      temperature: in `(0, 1]`.
      broadcast_dims: dimensions along which the mask is shared.
      shape: of `rate_logit`, which broadcasts against the inputs: `()` for one rate, `(features,)` for one each.

    Example:
      >>> layer, x = ConcreteDropout(), jnp.ones((2, 3))
      >>> variables = layer.init(jax.random.key(0), x, deterministic=True)
      >>> y = layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
      >>> kl = divergences.concrete_dropout_kl(variables["params"]["rate_logit"], jnp.ones((3, 4)))
    """

    initial_rate: ArrayLike = 0.1
    temperature: ArrayLike = 0.1
    broadcast_dims: Sequence[int] = ()
    shape: int | Sequence[int] = ()

    _function = staticmethod(learned.concrete_dropout)

    def setup(self) -> None:
        """Makes the parameter."""
        first = learned.logits("ConcreteDropout", self.initial_rate, self.shape)
        self.rate_logit = self.param("rate_logit", lambda _: first)


class VariationalGaussianDropout(Layer):
    """`dropjax.variational_gaussian_dropout` as a layer: the log variance of its noise is the parameter `log_alpha`.

    Add to the loss `dropjax.variational_dropout_kl(log_alpha) / N` for each weight of the layer that follows.

    Attributes:
      initial_log_alpha: a number; -2.2 is dropout's noise at a rate of 0.1.
      broadcast_dims: dimensions along which the noise is shared.
      shape: of `log_alpha`, which broadcasts against the inputs: `()` for one, `(features,)` for one each.
    """

    initial_log_alpha: ArrayLike = -2.2
    broadcast_dims: Sequence[int] = ()
    shape: int | Sequence[int] = ()

    _function = staticmethod(learned.variational_gaussian_dropout)

    def setup(self) -> None:
        """Makes the parameter."""
        name = "VariationalGaussianDropout"
        first = learned.log_variances(name, "initial_log_alpha", self.initial_log_alpha, self.shape)
        self.log_alpha = self.param("log_alpha", lambda _: first)


class _Dense(Layer):
    """What both dense layers share: a kernel, a bias, and a parameter that says how noisy the kernel is."""

    _function: ClassVar[Any]
    _noise: ClassVar[str]

    features: int
    use_bias: bool = True
    per: str = "weight"
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()

    def _mean(self, kernel: Array, noise: Array) -> Array:
        return kernel

    def _log_alpha(self, kernel: Array, noise: Array) -> Array:
        return noise

    @nn.compact
    def __call__(
        self,
        inputs: ArrayLike,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        start: Mapping[int, ArrayLike] | None = None,
    ) -> Array:
        """Applies the layer to the inputs.

        Args:
          inputs: real float `[..., features in]`.
          deterministic: if True there is no noise; given here or as a field.
          rng: a key to use instead of one from `make_rng(rng_collection)`.
          start: `{dim: index}`, where the output starts in the whole array.

        Returns:
          Array `[..., features]` of the dtype of the inputs; products are of float32 at least, and rounded once.
        """
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        x = variational.inputs(self._function.__name__, inputs)
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        first = f"initial_{self._noise}"
        given = (type(self).__name__, first, getattr(self, first), self.per, shape)
        noise = self.param(self._noise, lambda _: learned.noise(*given))
        if not self.is_initializing() and self.is_mutable_collection("losses"):
            kl = divergences.variational_dropout_kl(self._log_alpha(kernel, noise))
            kl = jnp.broadcast_to(kl, shape).sum()  # once, also where the layer is called twice
            self.sow("losses", "kl", kl, init_fn=lambda: jnp.zeros(()), reduce_fn=lambda _, new: new)
        if deterministic:
            y = variational.without_noise(self._function.__name__, x, self._mean(kernel, noise))
            _layers.unmoved(self, start, y)
        else:
            key = key_from_stream(self, self.rng_collection) if rng is None else rng
            y = self._function(key, x, kernel, noise, start=start, sharded_dims=sharding.manual(self.sharded_dims))
        if not self.use_bias:
            return y
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        return y + jnp.broadcast_to(bias, y.shape).astype(y.dtype)


class VariationalDense(_Dense):
    """A dense layer by `dropjax.variational_dense`: noise on its weights, whose variance is the parameter `log_alpha`.

    Without noise and for float32 inputs it is `flax.linen.Dense` with the same kernel and bias; narrower inputs, which
    Flax would promote, keep their dtype.

    Attributes:
      features: number of outputs.
      use_bias: whether a bias is added.
      per: `"weight"`, `"unit"` (of the inputs) or `"layer"`, what has a `log_alpha` of its own.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
      initial_log_alpha: a number; -2.2 is dropout's noise at a rate of 0.1.
    """

    initial_log_alpha: ArrayLike = -2.2
    _function = staticmethod(variational.variational_dense)
    _noise = "log_alpha"


class SparseVariationalDense(_Dense):
    """A dense layer by `dropjax.sparse_variational_dense`, whose weights become noise, and then 0, where they can.

    The log variances of the weights are the parameter `log_sigma2`. Without noise it is a dense layer with
    `dropjax.sparse_kernel(kernel, log_sigma2)`.

    Attributes:
      features: number of outputs.
      use_bias: whether a bias is added.
      per: `"weight"`, `"unit"` (of the inputs) or `"layer"`, what has a `log_sigma2` of its own.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
      initial_log_sigma2: a number.
      threshold: log alpha above which a weight is 0 without noise.

    Example:
      >>> layer, x = SparseVariationalDense(4), jnp.ones((2, 3))
      >>> variables = layer.init(jax.random.key(0), x, deterministic=True)
      >>> rngs = {"dropout": jax.random.key(1)}
      >>> y, changed = layer.apply(variables, x, deterministic=False, rngs=rngs, mutable=["losses"])
      >>> kl = sum(jax.tree.leaves(changed["losses"]))
    """

    initial_log_sigma2: ArrayLike = -10.0
    threshold: ArrayLike = 3.0
    _function = staticmethod(variational.sparse_variational_dense)
    _noise = "log_sigma2"

    def _mean(self, kernel: Array, noise: Array) -> Array:
        return variational.sparse_kernel(kernel, noise, threshold=self.threshold)

    def _log_alpha(self, kernel: Array, noise: Array) -> Array:
        return variational.sparse_log_alpha(kernel, noise)
