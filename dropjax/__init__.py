"""Dropout for JAX: masks that are a pure function of a key and of each element's place.

The functions are here; the layers are in `dropjax.linen` and `dropjax.nnx`, Monte Carlo dropout in
`dropjax.mc`, the training loop in `dropjax.training`.
"""

from typing import TYPE_CHECKING

from dropjax import _names
from dropjax.functional.adaptive import standout as standout
from dropjax.functional.adaptive import standout_expectation as standout_expectation
from dropjax.functional.blocks import drop_block as drop_block
from dropjax.functional.depth import drop_path as drop_path
from dropjax.functional.depth import layer_drop as layer_drop
from dropjax.functional.divergences import concrete_dropout_kl as concrete_dropout_kl
from dropjax.functional.divergences import variational_dropout_kl as variational_dropout_kl
from dropjax.functional.elementwise import dropout as dropout
from dropjax.functional.elementwise import gaussian_dropout as gaussian_dropout
from dropjax.functional.ensembles import masksembles as masksembles
from dropjax.functional.ensembles import masksembles_masks as masksembles_masks
from dropjax.functional.ensembles import masksembles_samples as masksembles_samples
from dropjax.functional.graphs import drop_edge as drop_edge
from dropjax.functional.graphs import drop_node as drop_node
from dropjax.functional.graphs import mask_feature as mask_feature
from dropjax.functional.learned import concrete_dropout as concrete_dropout
from dropjax.functional.learned import variational_gaussian_dropout as variational_gaussian_dropout
from dropjax.functional.losses import multi_sample_dropout as multi_sample_dropout
from dropjax.functional.losses import r_drop as r_drop
from dropjax.functional.losses import symmetric_kl as symmetric_kl
from dropjax.functional.noise import gaussian_noise as gaussian_noise
from dropjax.functional.noise import uniform_dropout as uniform_dropout
from dropjax.functional.pruning import targeted_dropout as targeted_dropout
from dropjax.functional.self_normalising import alpha_dropout as alpha_dropout
from dropjax.functional.self_normalising import feature_alpha_dropout as feature_alpha_dropout
from dropjax.functional.sequences import token_dropout as token_dropout
from dropjax.functional.structured import spatial_dropout as spatial_dropout
from dropjax.functional.tokens import drop_head as drop_head
from dropjax.functional.tokens import embedding_dropout as embedding_dropout
from dropjax.functional.variational import local_reparametrization as local_reparametrization
from dropjax.functional.variational import sparse_kernel as sparse_kernel
from dropjax.functional.variational import sparse_log_alpha as sparse_log_alpha
from dropjax.functional.variational import sparse_variational_dense as sparse_variational_dense
from dropjax.functional.variational import sparsity as sparsity
from dropjax.functional.variational import variational_dense as variational_dense
from dropjax.functional.weights import drop_connect as drop_connect
from dropjax.functional.weights import weight_drop as weight_drop
from dropjax.masks import apply_mask as apply_mask
from dropjax.masks import keep_mask as keep_mask

if TYPE_CHECKING:
    from dropjax import bits as bits
    from dropjax import constraints as constraints
    from dropjax import linen as linen
    from dropjax import mc as mc
    from dropjax import nnx as nnx
    from dropjax import schedules as schedules
    from dropjax import sharding as sharding
    from dropjax import training as training
else:
    __getattr__, __dir__ = _names.lazy(
        __name__, "bits", "constraints", "linen", "mc", "nnx", "schedules", "sharding", "training"
    )

__all__ = [
    "alpha_dropout",
    "apply_mask",
    "concrete_dropout",
    "concrete_dropout_kl",
    "drop_block",
    "drop_connect",
    "drop_edge",
    "drop_head",
    "drop_node",
    "drop_path",
    "dropout",
    "embedding_dropout",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "keep_mask",
    "layer_drop",
    "local_reparametrization",
    "mask_feature",
    "masksembles",
    "masksembles_masks",
    "masksembles_samples",
    "multi_sample_dropout",
    "r_drop",
    "sparse_kernel",
    "sparse_log_alpha",
    "sparse_variational_dense",
    "sparsity",
    "spatial_dropout",
    "standout",
    "standout_expectation",
    "symmetric_kl",
    "targeted_dropout",
    "token_dropout",
    "uniform_dropout",
    "variational_dense",
    "variational_dropout_kl",
    "variational_gaussian_dropout",
    "weight_drop",
]

__version__ = "0.1.0"
