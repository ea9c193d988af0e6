"""Names and keywords of other libraries, and what they are called here: one table for errors and for docs/flax.md.

A name that is asked for in the wrong place, a keyword of PyTorch or Keras, and arguments in another order
raise errors that state ours.
"""

import difflib
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple


class Name(NamedTuple):
    """What other libraries call a function or a layer."""

    typed: str  # names, separated by spaces
    library: str  # "" where several have it, or a paper
    function: str  # in dropjax
    layer: str = ""  # in dropjax.linen and dropjax.nnx
    remark: str = ""  # a sentence


class Keyword(NamedTuple):
    """What other libraries call an argument."""

    typed: str  # keywords, separated by spaces
    here: dict[str, str]  # ours and its meaning, the first that a function has; "" where it has none of them
    # a meaning may name the {typed} keyword


_CHANNELS = "Channels are the last dimension: for [batch, channels, ...] pass channel_axis=1."
_STEPS = "Pass broadcast_dims=(1,) for [batch, steps, features]: all steps share a mask."
_SAMPLES = "A Flax model draws in it by dropjax.nnx.mc_view or dropjax.linen.mc_apply."

NAMES = (
    Name("Dropout1d", "PyTorch", "spatial_dropout", "SpatialDropout1D", _CHANNELS),
    Name("Dropout2d", "PyTorch", "spatial_dropout", "SpatialDropout2D", _CHANNELS),
    Name("Dropout3d", "PyTorch", "spatial_dropout", "SpatialDropout3D", _CHANNELS),
    Name("dropout1d dropout2d dropout3d feature_dropout", "PyTorch", "spatial_dropout", "SpatialDropout", _CHANNELS),
    Name("Identity", "PyTorch", "dropout", "Dropout", "A layer of rate 0 returns its inputs."),
    Name("StochasticDepth stochastic_depth", "torchvision", "drop_path", "DropPath"),
    Name("DropBlock2d DropBlock3d drop_block2d drop_block3d", "torchvision", "drop_block", "DropBlock"),
    Name("drop_block_2d drop_block_fast_2d", "timm", "drop_block", "DropBlock"),
    Name("DropBlock1D DropBlock2D DropBlock3D", "KerasCV", "drop_block", "DropBlock"),
    Name("PatchDropout patch_dropout", "timm", "token_dropout", "TokenDropout"),
    Name("LayerDropModuleList", "fairseq", "layer_drop", "LayerDrop"),
    Name("LockedDropout", "AWD-LSTM", "dropout", "Dropout", _STEPS),
    Name("RNNDropout", "fastai", "dropout", "Dropout", _STEPS),
    Name(
        "VariationalDropout variational_dropout", "", "dropout", "Dropout",
        _STEPS + " Kingma's, with learned noise, is dropjax.variational_gaussian_dropout.",
    ),
    Name(
        "recurrent_dropout", "Keras", "dropout", "Dropout",
        "Give all steps one key, and they share a mask; dropjax.weight_drop drops recurrent weights.",
    ),
    Name("WeightDropout", "fastai", "weight_drop", "WeightDrop"),
    Name("embedded_dropout", "AWD-LSTM", "embedding_dropout", "EmbeddingDropout"),
    Name(
        "WordDropout word_dropout", "", "embedding_dropout", "EmbeddingDropout",
        "It drops words of the vocabulary; dropout with broadcast_dims=(-1,) drops each occurrence by itself.",
    ),
    Name("dropout_edge dropout_adj", "PyG", "drop_edge"),
    Name("dropout_node", "PyG", "drop_node"),
    Name(
        "dropout_path", "PyG", "drop_edge", "",
        "It drops edges one by one, not along random walks. Stochastic depth is dropjax.drop_path.",
    ),
    Name("DropEdge", "DGL", "drop_edge"),
    Name("DropNode", "DGL", "drop_node"),
    Name("FeatMask", "DGL", "mask_feature", "MaskFeature"),
    Name("AdaptiveDropout adaptive_dropout", "", "standout", "Standout"),
    Name("Uout", "", "uniform_dropout", "UniformDropout"),
    Name("Masksembles1D Masksembles2D Masksembles3D", "", "masksembles", "Masksembles"),
    Name("MultiSampleDropout", "", "multi_sample_dropout"),
    Name("RDrop rdrop", "", "r_drop"),
    Name("dropout_mask get_dropout_mask", "", "keep_mask"),
    Name("MCDropout MonteCarloDropout mc_dropout monte_carlo_dropout", "", "mc.classify", "", _SAMPLES),
    Name("enable_dropout", "", "nnx.mc_view", "", "For Linen it is dropjax.linen.mc_apply."),
    Name("predictive_entropy mutual_information BALD bald", "", "mc.classify", "", "They are fields of its result."),
    Name("ECE ece expected_calibration_error CalibrationError", "", "mc.calibration_error"),
    Name("reliability_diagram calibration_curve", "", "mc.reliability", "", "dropjax.mc.plots.reliability draws it."),
    Name("TemperatureScaling temperature_scaling", "", "mc.fit_temperature"),
    Name("BrierScore brier_score brier_score_loss", "", "mc.brier"),
    Name("NLL nll nll_loss log_loss", "", "mc.negative_log_likelihood"),
    Name("crps_ensemble", "", "mc.crps"),
    Name("crps_normal", "", "mc.crps_gaussian"),
    Name("PinballLoss pinball_loss mean_pinball_loss quantile_loss", "", "mc.pinball"),
    Name("AUROC auroc roc_auc_score", "", "mc.detection"),
    Name("MaxNorm", "Keras", "constraints.max_norm"),
)  # fmt: skip
"""Names that are not ours, and what is."""

_DROPPING = "the probability of dropping"
_ARRAY = "the array"
_NO_FLAG = "There is no flag: where nothing is to be dropped, do not call it."

KEYWORDS = (
    Keyword(
        "p prob drop_prob drop_rate dropout_rate dropout_prob rate",
        {
            "rate": _DROPPING,
            "initial_rate": _DROPPING + " before training",
            "rate_logit": f"the logit of {_DROPPING}",
            "stddev": "the standard deviation of the noise",
            "beta": "half the width of the noise",
            "log_alpha": "the logarithm of the noise's relative variance, p / (1 - p)",
            "initial_log_alpha": "the logarithm of the noise's relative variance, p / (1 - p), before training",
        },
    ),
    Keyword("keep_prob keep_rate", {"rate": f"{_DROPPING}, 1 - {{typed}}"}),
    Keyword("std sigma stdev", {"stddev": "the standard deviation of the noise"}),
    Keyword(
        "training train is_training",
        {"deterministic": "True in evaluation, the opposite of {typed}", "": _NO_FLAG},
    ),
    Keyword("inference deterministic", {"deterministic": "True in evaluation", "": _NO_FLAG}),
    Keyword(
        "noise_shape",
        {
            "broadcast_dims": "the dimensions along which a mask is shared, where noise_shape is 1",
            "batch_axes": "the dimensions along which masks differ besides the channel's, where noise_shape is not 1",
            "batch_axis": "the dimension along which masks differ, where noise_shape is not 1",
        },
    ),
    Keyword(
        "seed rng rngs key random_state prng_key",
        {
            "key": "a JAX key, jax.random.key(0)",
            "rngs": "a key, or streams, nnx.Rngs(0)",
            "rng": "a key, or leave it to apply(..., rngs={{'dropout': key}})",
            "seed": "an integer",
            "rng_collection": "the name of a stream: a key goes to the call, as rng",
        },
    ),
    Keyword("inplace out", {"": "JAX arrays do not change: take what is returned."}),
    Keyword("dtype", {"": "What is returned has the dtype of x."}),
    Keyword(
        "dim dims axis axes shared_axes",
        {
            "broadcast_dims": "the dimensions along which a mask is shared",
            "channel_axis": "the dimension of the channels",
            "head_axis": "the dimension of the heads",
            "token_axis": "the dimension of the tokens",
            "batch_axis": "the dimension of the examples",
            "axis": "a dimension",
            "sharded_dims": "the dimensions that are cut over devices",
        },
    ),
    Keyword("data_format", {"channel_axis": "-1 for channels_last, 1 for channels_first"}),
    Keyword("batch_dim batch_dims", {"batch_axis": "the dimension of the examples", "batch_axes": "those of examples"}),
    Keyword("input inputs x X", {"x": _ARRAY, "inputs": _ARRAY}),
    Keyword("kernel_size size", {"block_size": "the length of a block"}),
    Keyword("couple_channels", {"shared_channels": "whether all channels of an example share a mask"}),
    Keyword("scale_by_keep rescale scale", {"scale": "whether what is kept is divided", "rescale": "the same"}),
    Keyword("edge_index", {"senders": "its first row; receivers is the second"}),
    Keyword("force_undirected", {"undirected": "whether both directions of an edge share a decision"}),
    Keyword("num_nodes", {"nodes": "their number"}),
    Keyword("weights layers parameters", {"names": "which parameters, by name"}),
    Keyword(
        "model net network", {"module": "the model", "fn": "a function that applies the model", "state": "the model"}
    ),
    Keyword("params", {"variables": "what model.init returned", "state": "what is trained"}),
    Keyword("function f forward", {"fn": "the function"}),
    Keyword("n_samples samples num_mc_samples num_passes passes iterations n T", {"num_samples": "how many samples"}),
    Keyword("batch_size", {"chunk_size": "how many samples are computed at a time", "data": "batches by step"}),
    Keyword("n_bins bins", {"num_bins": "how many bins"}),
    Keyword("from_logits", {"logits": "whether predictions are logits"}),
    Keyword(
        "probs preds y_pred y_prob predictions outputs",
        {"probabilities": "[n, classes]", "predictions": "[n, classes]", "mean": "[n]"},
    ),
    Keyword("target targets y y_true label", {"labels": "of the true classes", "targets": "the true values"}),
    Keyword("loss", {"loss_fn": "a function of state, batch and key"}),
    Keyword("epochs num_steps", {"steps": "how many steps in all"}),
    Keyword("lr learning_rate", {"optimizer": "an optax transformation, optax.adam(1e-3)"}),
    Keyword("callbacks callback", {"evaluate": "a function of the state that returns named numbers"}),
    Keyword("init_value", {"start": "the first rate", "rate": "the first rate"}),
    Keyword("end_value", {"end": "the last rate"}),
    Keyword("transition_steps decay_steps total_steps", {"steps": "how many steps"}),
    Keyword("transition_begin", {"begin": "the step at which it begins"}),
    Keyword("max_norm c", {"max_value": "the largest norm"}),
)
"""Keywords that are not ours, and what is."""

_LAYERS = """
AlphaDropout ConcreteDropout DropBlock DropConnect DropConnectDense DropHead DropPath Dropout EmbeddingDropout
FeatureAlphaDropout GaussianDropout GaussianNoise LayerDrop MaskFeature Masksembles SparseVariationalDense
SpatialDropout SpatialDropout1D SpatialDropout2D SpatialDropout3D Standout TargetedDropout TokenDropout
UniformDropout VariationalDense VariationalGaussianDropout WeightDrop replace_flax
"""
_PUBLIC = {
    "dropjax": """
        alpha_dropout apply_mask concrete_dropout concrete_dropout_kl drop_block drop_connect drop_edge drop_head
        drop_node drop_path dropout embedding_dropout feature_alpha_dropout gaussian_dropout gaussian_noise keep_mask
        layer_drop local_reparametrization mask_feature masksembles masksembles_masks masksembles_samples
        multi_sample_dropout r_drop sparse_kernel sparse_log_alpha sparse_variational_dense sparsity spatial_dropout
        standout standout_expectation symmetric_kl targeted_dropout token_dropout uniform_dropout variational_dense
        variational_dropout_kl variational_gaussian_dropout weight_drop
    """,
    "dropjax.linen": f"{_LAYERS} mc_apply mc_draws with_rates",
    "dropjax.nnx": f"{_LAYERS} Masks Rate mc_draws mc_view set_rates",
    "dropjax.mc": """
        Classification Coverage Detection Explanation FittedTemperature Regression Reliability RiskCoverage brier
        calibration_error classify conformal_intervals conformal_residuals conformal_scores conformal_sets
        conformal_threshold crps crps_gaussian detection explain fit_temperature interval_coverage
        negative_log_likelihood pinball regress reliability risk_coverage sample temperature_scale
    """,
    "dropjax.schedules": "Schedule constant cosine curriculum depth early late linear",
    "dropjax.constraints": "clip_norm max_norm",
    "dropjax.sharding": "ShardedDims assert_masks_differ",
    "dropjax.training": "Fit fit",
    "dropjax.bits": "VERSION random_words threefry2x32",
}
HOMES = {module: names.split() for module, names in _PUBLIC.items()}
"""The public names of each module, known without importing it."""

_TYPED = {name: row for row in NAMES for name in row.typed.split()}
_MEANT = {name: row.here for row in reversed(KEYWORDS) for name in row.typed.split()}


def lazy(module: str, *submodules: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` of a package, whose submodules are imported where they are asked for."""
    return functools.partial(_attribute, module, submodules), functools.partial(_dir, module, submodules)


def _attribute(module: str, submodules: tuple[str, ...], name: str) -> Any:
    """Imports a submodule; for a name that is not there, raises an AttributeError that states ours."""
    if name in submodules:
        return importlib.import_module(f"{module}.{name}")
    answer = None if name.startswith("_") else missing(module, name)
    if answer is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    # `from package import name` drops an AttributeError's text, but first importlib asks whether the name is there
    importing = sys._getframe(1).f_code.co_name == "_handle_fromlist"
    if importing and importlib.util.find_spec(f"{module}.{name}") is None:
        raise ImportError(answer, name=module)
    raise AttributeError(answer)


def _dir(module: str, submodules: tuple[str, ...]) -> list[str]:
    return sorted({*vars(sys.modules[module]), *submodules})


def missing(module: str, name: str) -> str | None:
    """Says what of ours was meant by a name that a module does not have; None where nothing is like it."""
    if name in _TYPED:
        row = _TYPED[name]
        said = f"{row.library}'s {name} is" if row.library else f"{name} is"
        return " ".join(filter(None, [f"{module} has no {name}: {said} {_here(module, row)}.", row.remark]))
    homes = [f"{home}.{name}" for home, names in HOMES.items() if name in names]
    snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in re.sub(r"\dD$", "", name)).strip("_")
    if homes:
        function = f", as a function dropjax.{snake}" if snake != name and snake in HOMES["dropjax"] else ""
        return f"{module} has no {name}: it is {' and '.join(homes)}{function}."
    flax = module.replace("dropjax", "flax")
    if flax != "flax" and hasattr(sys.modules.get(flax), name):
        return f"{module} has no {name}: it is {flax}.{name}."
    known = [*HOMES.get(module, []), *_TYPED, *(name for names in HOMES.values() for name in names)]
    alike = {_plain(candidate): candidate for candidate in reversed(known)}
    if not (near := difflib.get_close_matches(_plain(name), alike, n=1, cutoff=0.8)):
        return None
    meant = alike[near[0]]
    if meant in HOMES.get(module, []):
        return f"{module} has no {name}. Did you mean {module}.{meant}?"
    what = str(missing(module, meant)).removeprefix(f"{module} has no {meant}: ")
    return f"{module} has no {name}. Did you mean {meant}? {re.sub('^it is', 'It is', what)}"


def _here(module: str, row: Name) -> str:
    framework = "dropjax.linen" if module == "dropjax.linen" else "dropjax.nnx"
    return f"dropjax.{row.function}" + (f", as a layer {framework}.{row.layer}" if row.layer else "")


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def explain(name: str, keywords: Iterable[str], accepted: Collection[str]) -> TypeError | None:
    """Returns the error of keywords that a function or a layer does not take, or None if it takes all.

    Args:
      name: the function or layer.
      keywords: those that were given.
      accepted: those that it takes.

    Returns:
      A TypeError that says what each unknown keyword is called here, or which there are.
    """
    unknown = [keyword for keyword in keywords if keyword not in accepted]
    if not unknown:
        return None
    one = len(unknown) == 1
    said = list(filter(None, (_meaning(keyword, "It" if one else keyword, accepted) for keyword in unknown)))
    if len(said) < len(unknown):
        said.append(f"The keywords are {', '.join(accepted) or 'none'}.")
    first, *others = map(repr, unknown)
    what = f"{first} and {', '.join(others)}" if others else first
    return TypeError(f"{name}: got an unexpected keyword argument {what}. {' '.join(dict.fromkeys(said))}")


def is_meant(keyword: str, accepted: Collection[str]) -> bool:
    """Whether a keyword is another library's for one of those that are accepted."""
    return not _MEANT.get(keyword, {}).keys().isdisjoint(accepted)


def _meaning(typed: str, subject: str, accepted: Collection[str]) -> str | None:
    here = _MEANT.get(typed, {})
    for ours, meaning in here.items():
        if ours in accepted:
            return f"{subject} is {ours} here, {meaning.format(typed=typed)}."
    if "" in here:
        return here[""]
    near = difflib.get_close_matches(typed, accepted, n=1, cutoff=0.8)
    return f"Did you mean {near[0]}?" if near else None
