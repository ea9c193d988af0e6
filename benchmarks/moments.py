"""How far moments without sampling are from samples: widths and depths of random ReLU networks under dropout.

python -m benchmarks.moments
"""

import itertools

import jax
import jax.numpy as jnp
from jax import Array

import dropjax
from dropjax.mc import moments

CHUNK = 10_000


def errors(widths: tuple[int, ...], rate: float, key: Array, num_samples: int) -> tuple[Array, Array]:
    """Compares the outputs of a network with He's initial weights, dropout before each layer, with its samples.

    Returns the distance of the means in units of the sampled standard deviation, and the ratio of the propagated
    standard deviation to the sampled one, of each output.
    """
    keys = jax.random.split(key, len(widths))
    x = jax.random.normal(keys[0], widths[:1])
    shapes = itertools.pairwise(widths)
    kernels = [jax.random.normal(k, shape) * (2 / shape[0]) ** 0.5 for k, shape in zip(keys[1:], shapes, strict=True)]

    mean, var = x, jnp.zeros_like(x)
    for i, kernel in enumerate(kernels):
        mean, var = moments.relu(mean, var) if i else (mean, var)
        mean, var = moments.dense(*moments.dropout(mean, var, rate), kernel)

    def sums(t: Array) -> Array:
        y = x
        for i, kernel in enumerate(kernels):
            y = jax.nn.relu(y) if i else y
            y = dropjax.dropout(jax.random.fold_in(jax.random.fold_in(key, t), i), y, rate) @ kernel
        return jnp.stack([y - mean, (y - mean) ** 2])

    def chunk(total: Array, first: Array) -> tuple[Array, None]:
        return total + jax.vmap(sums)(first + jnp.arange(CHUNK)).sum(0), None

    total, _ = jax.lax.scan(chunk, jnp.zeros((2, widths[-1])), jnp.arange(0, num_samples, CHUNK))
    shift, square = total / num_samples
    std = jnp.sqrt(square - shift**2)
    return jnp.abs(shift) / std, jnp.sqrt(var) / std


def main() -> None:
    """Prints the table of docs/judging_uncertainty.md."""
    print("layers        width   mean off by (std)   std too small or large by: mean, worst of 32 outputs")
    for depth in (1, 2, 3, 5):
        for width in (8, 32, 128):
            widths = (width,) * depth + (32,)
            shift, ratio = jax.jit(lambda key, widths=widths: errors(widths, 0.2, key, 50_000))(jax.random.key(0))
            off = jnp.abs(ratio - 1)
            print(f"{depth} dense {width:12d} {shift.mean():14.3f} {off.mean():25.1%} {off.max():8.1%}", flush=True)


if __name__ == "__main__":
    main()
