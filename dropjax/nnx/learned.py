"""The NNX layers with parameters of their own: learned rates, and dense layers with noise on their weights.

The dense layers have a method `kl`, their divergence from the prior:

    loss = ... + sum(layer.kl() for layer in (model.first, model.second)) / number_of_examples
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from dropjax import _layers
from dropjax.functional import divergences, learned, variational
from dropjax.nnx.base import Layer, Source

__all__ = ["ConcreteDropout", "SparseVariationalDense", "VariationalDense", "VariationalGaussianDropout"]


@nnx.dataclass(eq=False)
class ConcreteDropout(Layer):
    """`dropjax.concrete_dropout` as a layer: the logit of its rate is the parameter `rate_logit`.

    Add `dropjax.concrete_dropout_kl(layer.rate_logit, following.kernel) / N` to the loss, with the layer that follows.

    Args:
      initial_rate: in `(0, 1)`.
      temperature: in `(0, 1]`.
      broadcast_dims: dimensions along which the mask is shared.
      shape: of `rate_logit`, which broadcasts against the inputs: `()` for one rate, `(features,)` for one each.

    Example:
      >>> layer, following = ConcreteDropout(rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(1))
      >>> y = following(layer(jnp.ones((2, 3))))
      >>> kl = divergences.concrete_dropout_kl(layer.rate_logit, following.kernel)
    """

    initial_rate: ArrayLike = 0.1
    _: dataclasses.KW_ONLY
    temperature: ArrayLike = 0.1
    broadcast_dims: Sequence[int] = ()
    shape: int | Sequence[int] = ()
    _function = staticmethod(learned.concrete_dropout)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rate_logit = nnx.Param(learned.logits("ConcreteDropout", self._field("initial_rate"), self.shape))


@nnx.dataclass(eq=False)
class VariationalGaussianDropout(Layer):
    """`dropjax.variational_gaussian_dropout` as a layer: the log variance of its noise is the parameter `log_alpha`.

    Add to the loss `dropjax.variational_dropout_kl(layer.log_alpha) / N` for each weight of the layer that follows.

    Args:
      initial_log_alpha: a number; -2.2 is dropout's noise at a rate of 0.1.
      broadcast_dims: dimensions along which the noise is shared.
      shape: of `log_alpha`, which broadcasts against the inputs: `()` for one, `(features,)` for one each.
    """

    initial_log_alpha: ArrayLike = -2.2
    _: dataclasses.KW_ONLY
    broadcast_dims: Sequence[int] = ()
    shape: int | Sequence[int] = ()
    _function = staticmethod(learned.variational_gaussian_dropout)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "VariationalGaussianDropout"
        first = learned.log_variances(name, "initial_log_alpha", self._field("initial_log_alpha"), self.shape)
        self.log_alpha = nnx.Param(first)


@nnx.dataclass(eq=False)
class _Dense(Layer):
    """What both dense layers share: a kernel, a bias, and a parameter that says how noisy the kernel is."""

    _function: ClassVar[Any]
    _noise: ClassVar[str]

    in_features: int
    out_features: int
    _: dataclasses.KW_ONLY
    use_bias: bool = True
    per: str = "weight"
    kernel_init: dataclasses.InitVar[Any] = nnx.initializers.lecun_normal()
    bias_init: dataclasses.InitVar[Any] = nnx.initializers.zeros_init()

    def __post_init__(self, kernel_init: Any, bias_init: Any) -> None:  # not kept, as in Flax
        if not isinstance(self.rngs, nnx.Rngs):
            name = type(self).__name__
            raise ValueError(f"{name}: rngs must be nnx.Rngs, from which the parameters come, got {self.rngs!r}.")
        shape, streams = (self.in_features, self.out_features), self.rngs
        super().__post_init__()
        self.kernel = nnx.Param(kernel_init(streams.params(), shape, jnp.float32))
        first = f"initial_{self._noise}"
        noise = learned.noise(type(self).__name__, first, self._field(first), self.per, shape)
        setattr(self, self._noise, nnx.Param(noise))
        bias = bias_init(streams.params(), shape[1:], jnp.float32) if self.use_bias else None
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))

    def mean_kernel(self) -> Array:
        """Returns the kernel without noise, as in evaluation."""
        return self.kernel[...]

    def log_alpha_of_weights(self) -> Array:
        """Returns the log variance of the noise relative to the kernel; it broadcasts against the kernel."""
        return self._noise_of_weights()

    def _noise_of_weights(self) -> Array:
        return getattr(self, self._noise)[...]

    def kl(self) -> Array:
        """Returns the divergence of all weights from the prior, float32 `[]`; the loss takes it over N."""
        kl = divergences.variational_dropout_kl(self.log_alpha_of_weights())
        return jnp.broadcast_to(kl, (self.in_features, self.out_features)).sum()

    def __call__(
        self,
        inputs: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: Source = None,
        start: Mapping[int, ArrayLike] | None = None,
    ) -> Array:
        """Applies the layer to the inputs.

        Args:
          inputs: real float `[..., in_features]`.
          deterministic: if True there is no noise; overrides the field.
          rngs: a key, `RngStream` or `Rngs` to use instead of the layer's own.
          start: `{dim: index}`, where the output starts in the whole array.

        Returns:
          Array `[..., out_features]` of the dtype of the inputs; products are of float32 at least, and rounded once.
        """
        x = variational.inputs(self._function.__name__, inputs)
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic:
            y = variational.without_noise(self._function.__name__, x, self.mean_kernel())
            _layers.unmoved(self, start, y)
        else:
            key, noise = self._key(x, deterministic, rngs), self._noise_of_weights()
            options = {"start": start, "sharded_dims": self._field("sharded_dims")}
            y = self._function(key, x, self.kernel[...], noise, **options)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape).astype(y.dtype)


@nnx.dataclass(eq=False)
class VariationalDense(_Dense):
    """A dense layer by `dropjax.variational_dense`: noise on its weights, whose variance is the parameter `log_alpha`.

    Without noise and for float32 inputs it is `flax.nnx.Linear` with the same kernel and bias; narrower inputs, which
    Flax would promote, keep their dtype.

    Args:
      in_features: number of inputs.
      out_features: number of outputs.
      use_bias: whether a bias is added.
      per: `"weight"`, `"unit"` (of the inputs) or `"layer"`, what has a `log_alpha` of its own.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
      initial_log_alpha: a number; -2.2 is dropout's noise at a rate of 0.1.
    """

    _: dataclasses.KW_ONLY
    initial_log_alpha: ArrayLike = -2.2
    _function = staticmethod(variational.variational_dense)
    _noise = "log_alpha"


@nnx.dataclass(eq=False)
class SparseVariationalDense(_Dense):
    """A dense layer by `dropjax.sparse_variational_dense`, whose weights become noise, and then 0, where they can.

    The log variances of the weights are the parameter `log_sigma2`. Without noise it is a dense layer with
    `dropjax.sparse_kernel(kernel, log_sigma2)`.

    Args:
      in_features: number of inputs.
      out_features: number of outputs.
      use_bias: whether a bias is added.
      per: `"weight"`, `"unit"` (of the inputs) or `"layer"`, what has a `log_sigma2` of its own.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
      initial_log_sigma2: a number.
      threshold: log alpha above which a weight is 0 without noise.

    Example:
      >>> layer = SparseVariationalDense(3, 4, rngs=nnx.Rngs(0))
      >>> y, kl = layer(jnp.ones((2, 3))), layer.kl()
    """

    _: dataclasses.KW_ONLY
    initial_log_sigma2: ArrayLike = -10.0
    threshold: ArrayLike = 3.0
    _function = staticmethod(variational.sparse_variational_dense)
    _noise = "log_sigma2"

    def mean_kernel(self) -> Array:
        """Returns the kernel without weights that are mostly noise, as in evaluation."""
        return variational.sparse_kernel(self.kernel[...], self._noise_of_weights(), threshold=self._field("threshold"))

    def log_alpha_of_weights(self) -> Array:
        """Returns the log variance of the noise relative to the kernel."""
        return variational.sparse_log_alpha(self.kernel[...], self._noise_of_weights())
