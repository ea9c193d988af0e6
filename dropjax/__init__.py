"""Dropout for JAX: masks that are a pure function of a key and of each element's place.

The functions are here; the layers are in `dropjax.linen` and `dropjax.nnx`, Monte Carlo dropout in
`dropjax.mc`, the training loop in `dropjax.training`.
"""

from dropjax.functional.adaptive import standout as standout
from dropjax.functional.adaptive import standout_expectation as standout_expectation
from dropjax.functional.blocks import drop_block as drop_block
from dropjax.functional.depth import drop_path as drop_path
from dropjax.functional.elementwise import dropout as dropout
from dropjax.functional.elementwise import gaussian_dropout as gaussian_dropout
from dropjax.functional.graphs import drop_edge as drop_edge
from dropjax.functional.graphs import drop_node as drop_node
from dropjax.functional.graphs import mask_feature as mask_feature
from dropjax.functional.noise import gaussian_noise as gaussian_noise
from dropjax.functional.noise import uniform_dropout as uniform_dropout
from dropjax.functional.pruning import targeted_dropout as targeted_dropout
from dropjax.functional.self_normalising import alpha_dropout as alpha_dropout
from dropjax.functional.self_normalising import feature_alpha_dropout as feature_alpha_dropout
from dropjax.functional.sequences import token_dropout as token_dropout
from dropjax.functional.structured import spatial_dropout as spatial_dropout
from dropjax.functional.tokens import drop_head as drop_head
from dropjax.functional.tokens import embedding_dropout as embedding_dropout
from dropjax.masks import apply_mask as apply_mask
from dropjax.masks import keep_mask as keep_mask

__version__ = "0.1.0"
