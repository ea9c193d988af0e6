"""How the layers of an NNX model are stacked, for `nnx.scan` or `nnx.vmap`, read off the shapes of what they hold."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

_SHAPES: dict[type, Any] = {
    nnx.Linear: ("kernel", lambda layer: (layer.in_features, layer.out_features)),
    nnx.LinearGeneral: ("kernel", lambda layer: (*_tuple(layer.in_features), *_tuple(layer.out_features))),
    nnx.Conv: ("kernel", lambda layer: layer.kernel_shape),
    nnx.ConvTranspose: ("kernel", lambda layer: layer.kernel_shape),
    nnx.Embed: ("embedding", lambda layer: (layer.num_embeddings, layer.features)),
    nnx.BatchNorm: ("mean", lambda layer: (layer.num_features,)),
    nnx.LayerNorm: ("scale", lambda layer: (layer.num_features,)),
    nnx.RMSNorm: ("scale", lambda layer: (layer.num_features,)),
    nnx.GroupNorm: ("scale", lambda layer: (layer.num_features,)),
}
"""The name of an array of a layer, and its shape in a layer that is not stacked."""


def shapes(modules: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns how each module is stacked: the shape before that of one layer, `()` where nothing shows it.

    A module with a stream of its own shows it by the shape of the keys, a layer of Flax by its
    parameters. Any other is stacked as those are that it holds, or that the nearest module around
    it holds: as the least stacked of them.

    Args:
      modules: the modules of a model by path, names joined by `/`.
    """
    shown = {path: stack for path, module in modules.items() if (stack := _shown(module)) is not None}
    return {path: _around(path, shown) for path in modules}


def _around(path: str, shown: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    inside = [stack for name, stack in shown.items() if not path or name == path or name.startswith(f"{path}/")]
    if inside or not path:
        return min(inside, key=len, default=())
    return _around(path.rpartition("/")[0], shown)


def _shown(module: Any) -> tuple[int, ...] | None:
    for stream in vars(module).values():
        if isinstance(stream, nnx.RngStream):
            return stream.key.shape
        if isinstance(stream, nnx.Rngs):
            return min(
                (one.key.shape for one in vars(stream).values() if isinstance(one, nnx.RngStream)),
                key=len,
                default=None,
            )
    for kind, (name, shape) in _SHAPES.items():
        array = getattr(module, name, None) if isinstance(module, kind) else None
        if array is not None:
            one = tuple(shape(module))
            stack = tuple(array.shape[: len(array.shape) - len(one)])
            return stack if tuple(array.shape) == (*stack, *one) else None
    return None


def _tuple(lengths: Any) -> tuple[int, ...]:
    return (lengths,) if isinstance(lengths, int) else tuple(lengths)
