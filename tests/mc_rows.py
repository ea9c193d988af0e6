"""Every public function of dropjax.mc once, at a tiny shape: `(name, call)`, for tests that run all of them."""

import jax
import jax.numpy as jnp
import numpy as np

import dropjax
from dropjax import mc

KEY, X = jax.random.key(0), jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 3


def logits(key):
    return dropjax.dropout(key, X, 0.5)


def gaussian(key):
    y = logits(key)
    return y, jnp.square(y) + 1


ROWS = [
    ("sample", lambda: mc.sample(logits, KEY, 4, chunk_size=3)),
    ("classify", lambda: mc.classify(logits, KEY, 4, chunk_size=3)),
    ("classify, one sample", lambda: mc.classify(logits, KEY, 1)),
    ("classify, masked", lambda: mc.classify(lambda key: logits(key).at[:, 0].set(-jnp.inf), KEY, 4, chunk_size=3)),
    ("classify, probabilities", lambda: mc.classify(lambda key: jax.nn.softmax(logits(key)), KEY, 4, logits=False)),
    (
        "classify, tolerance",
        lambda: mc.classify(logits, KEY, 5, chunk_size=2, tolerance=0.5, statistic="mutual_information"),
    ),
    ("regress", lambda: mc.regress(logits, KEY, 4, chunk_size=3, quantiles=[0.0, 0.5, 1.0])),
    ("regress, huge", lambda: mc.regress(lambda key: 3e38 * jnp.sign(logits(key) - 0.1), KEY, 4, quantiles=[0.5])),
    ("regress, variances", lambda: mc.regress(gaussian, KEY, 4, chunk_size=3, targets=X, event_dims=1)),
    ("regress, precision", lambda: mc.regress(logits, KEY, 5, chunk_size=2, targets=X, precision=2.0, tolerance=0.5)),
    ("explain", lambda: np.round(mc.explain(logits, KEY).share, 2)),  # of FLOPs, in which a mode may have some more
]
