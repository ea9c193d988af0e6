"""What every variant drops: one photograph, one sentence, one graph, and the same key for all.

Draws what each function of dropjax makes of a photograph (its pixels and patches), of a sentence (its words, features,
attention heads and layers), of a weight matrix and of a graph, in one figure:

    pip install '.[examples]'
    python examples/mask_gallery.py
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image

import dropjax

RATE = 0.3
SIDE, PATCH = 96, 12  # pixels of the photograph and of a patch
SENTENCE = "the cat that saw the dog ran to the tree"
WIDTH, HEADS, LAYERS, MEMBERS = 16, 8, 12, 8
BLUE, PALE, GREY = "#0072B2", "#A6CBE3", "#707070"
STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlepad": 4}


def photograph() -> Array:
    """Returns scikit-learn's photograph of a flower, `[side, side, 3]` in [0, 1]."""
    image = load_sample_image("flower.jpg")[:, 120:547].astype(np.float32) / 255
    rows, columns = (np.linspace(0, length, SIDE + 1).astype(int) for length in image.shape[:2])
    boxes = np.add.reduceat(np.add.reduceat(image, rows[:-1], 0), columns[:-1], 1)
    return jnp.asarray(boxes / (np.diff(rows)[:, None, None] * np.diff(columns)[:, None]))


def of_the_photograph(key: Array, image: Array) -> dict[str, tuple[Array, str]]:
    """Returns pictures `[side, side, 3]`, and what is dropped in each."""
    centered = (image - image.mean()) / image.std()
    batch = centered[None]

    def shown(y: Array) -> Array:
        return y.reshape(image.shape) * image.std() + image.mean()

    patches = (
        image.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH, 3).swapaxes(1, 2).reshape(1, -1, PATCH * PATCH * 3)
    )
    tokens, kept = dropjax.token_dropout(key, patches, RATE)
    left = jnp.ones_like(patches).at[:, kept[0]].set(tokens[0])
    back = left.reshape(SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, 3).swapaxes(1, 2).reshape(image.shape)
    logits = 4 * centered.mean(-1, keepdims=True)
    return {
        "the photograph": (image, ""),
        "dropout": (shown(dropjax.dropout(key, centered, RATE)), "single values"),
        "  broadcast_dims=(2,)": (shown(dropjax.dropout(key, centered, RATE, broadcast_dims=(2,))), "whole pixels"),
        "spatial_dropout": (shown(dropjax.spatial_dropout(key, batch, RATE)), "whole colours"),
        "drop_block": (
            shown(dropjax.drop_block(key, batch, RATE, block_size=11, shared_channels=True)),
            "blocks of 11 x 11",
        ),
        "token_dropout": (back, "patches are removed"),
        "gaussian_dropout": (shown(dropjax.gaussian_dropout(key, centered, RATE)), "times N(1, r / (1 - r))"),
        "gaussian_noise": (shown(dropjax.gaussian_noise(key, centered, RATE)), "plus N(0, σ²)"),
        "uniform_dropout": (shown(dropjax.uniform_dropout(key, centered, 1.0)), "times 1 + U(-1, 1)"),
        "alpha_dropout": (shown(dropjax.alpha_dropout(key, centered, RATE)), "to SELU's floor"),
        "feature_alpha_dropout": (shown(dropjax.feature_alpha_dropout(key, batch, RATE)), "the same, whole colours"),
        "concrete_dropout": (
            shown(dropjax.concrete_dropout(key, centered, jnp.log(RATE / (1 - RATE)))),
            "soft, its rate is learned",
        ),
        "standout": (shown(dropjax.standout(key, centered, logits)), "dark values more often"),
        "targeted_dropout": (
            shown(dropjax.targeted_dropout(key, centered.reshape(-1, 1), 0.9)),
            "values near the mean",
        ),
    }


def of_the_sentence(key: Array, words: Sequence[str]) -> dict[str, tuple[Array, str]]:
    """Returns tables of ones `[words or others, columns]` after the drop, and what rows and columns are."""
    _, ids = np.unique(words, return_inverse=True)
    x = jnp.ones((len(words), WIDTH))
    weights = dropjax.drop_head(key, jnp.ones((1, HEADS, len(words))), RATE, batch_axes=())[0]
    tokens = dropjax.token_dropout(key, x[None], RATE)
    network = jnp.ones((LAYERS, WIDTH))
    ran = [dropjax.layer_drop(jax.random.fold_in(key, i), lambda x: 0 * x, network[i], RATE) for i in range(LAYERS)]
    members = dropjax.masksembles_masks(key, WIDTH, MEMBERS, 2.0).astype(jnp.float32)
    return {
        "dropout ": (dropjax.dropout(key, x, RATE), "words x features"),
        "  broadcast_dims=(0,)": (dropjax.dropout(key, x, RATE, broadcast_dims=(0,)), "the same at all words"),
        "embedding_dropout": (dropjax.embedding_dropout(key, x, RATE, indices=ids), "all of the same word"),
        "drop_block ": (
            dropjax.drop_block(key, x[None], RATE, block_size=3, shared_channels=True)[0],
            "spans of words",
        ),
        "token_dropout ": (jnp.zeros_like(x).at[tokens.indices[0]].set(1), "words are removed"),
        "mask_feature": (dropjax.mask_feature(key, x, RATE), "a feature of all words"),
        "drop_head": (weights.T, "words x heads"),
        "drop_path": (dropjax.drop_path(key, network, RATE), "whole examples"),
        "layer_drop": (1 - jnp.stack(ran), "layers, not computed"),
        "drop_connect": (dropjax.drop_connect(key, network, RATE), "single weights"),
        "multi_sample_dropout": (
            dropjax.multi_sample_dropout(key, lambda y: y, jnp.ones(WIDTH), RATE, num_samples=MEMBERS),
            "samples of one input",
        ),
        "masksembles": (members, "fixed masks of members"),
    }


def of_the_graph(key: Array) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Returns places of nodes, pairs of nodes, and which nodes and edges are kept."""
    angles = 2 * np.pi * np.arange(12) / 12
    places = np.stack([np.cos(angles), np.sin(angles)], -1) * np.where(np.arange(12) % 2, 1.0, 0.55)[:, None]
    ring, inner = np.arange(12), np.arange(0, 12, 2)
    u, v = np.concatenate([ring, inner]), np.concatenate([(ring + 1) % 12, (inner + 2) % 12])
    nodes = dropjax.drop_node(key, 12, u, v, RATE)
    edges = dropjax.drop_edge(key, u, v, RATE, undirected=True)
    return {
        "drop_edge": (places, np.stack([u, v], -1), np.ones(12, bool), np.asarray(edges)),
        "drop_node": (places, np.stack([u, v], -1), np.asarray(nodes.nodes), np.asarray(nodes.edges)),
    }


def draw_table(ax: Axes, values: Array, labels: Sequence[str]) -> None:
    """Draws a table: white where it is 0."""
    ax.imshow(
        np.where(values == 0, np.nan, values),
        cmap="Blues",
        vmin=0,
        vmax=1.6 * max(1.0, float(values.max())),
        aspect="auto",
    )
    rows, columns = values.shape
    ax.set(xticks=np.arange(columns + 1) - 0.5, yticks=np.arange(rows + 1) - 0.5)
    ax.grid(color="white", lw=0.8)
    for row, label in enumerate(labels):
        ax.text(-0.8, row, label, ha="right", va="center", size=8, color=GREY)


def draw_graph(ax: Axes, places: np.ndarray, edges: np.ndarray, nodes: np.ndarray, kept: np.ndarray) -> None:
    """Draws a graph: dropped nodes and edges are pale and dashed."""
    for pair, of in zip(edges, kept, strict=True):
        ax.plot(*places[pair].T, color=BLUE if of else PALE, lw=2 if of else 1, ls="-" if of else ":", zorder=1)
    for place, of in zip(places, nodes, strict=True):
        ax.plot(*place, "o", ms=8, color=BLUE if of else "white", mec=BLUE if of else PALE)
    ax.set(aspect="equal", xlim=(-1.15, 1.15), ylim=(-1.15, 1.15))
    ax.axis("off")


def main(argv: Sequence[str] | None = None) -> int:
    """Draws all variants with one key."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--seed", type=int, default=93, help="seed of the one key, in [0, 2^32)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of mask_gallery.png")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"argument --seed: must be in [0, 2^32), got {args.seed}")
    args.out.mkdir(parents=True, exist_ok=True)
    key, words = jax.random.key(args.seed), SENTENCE.split()
    panels: list[tuple[str, str, Callable[[Axes], Any]]] = []
    for name, (image, what) in of_the_photograph(key, photograph()).items():
        panels.append((name, what, lambda ax, image=image: ax.imshow(np.clip(image, 0, 1))))  # type: ignore[misc]
    for name, (table, what) in of_the_sentence(key, words).items():
        labels = words if len(table) == len(words) and name.strip() not in ("layer_drop", "masksembles") else []
        panels.append((name, what, lambda ax, table=table, labels=labels: draw_table(ax, table, labels)))  # type: ignore[misc]
    for name, graph in of_the_graph(key).items():
        panels.append((name, "pale: dropped", lambda ax, graph=graph: draw_graph(ax, *graph)))  # type: ignore[misc]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.3, 8.3))
        grid = figure.add_gridspec(4, 7, left=0.03, right=0.985, top=0.965, bottom=0.03, hspace=0.3, wspace=0.28)
        for cell, (name, what, draw) in zip(grid, panels, strict=True):  # type: ignore[call-overload]
            ax = figure.add_subplot(cell)
            draw(ax)
            ax.set_title(name, family="monospace")
            ax.text(0.5, -0.03, what, ha="center", va="top", color=GREY, transform=ax.transAxes)
            ax.tick_params(length=0, labelleft=False, labelbottom=False)
            for spine in ax.spines.values():
                spine.set_visible(False)
        figure.savefig(args.out / "mask_gallery.png", dpi=110, pil_kwargs={"optimize": True})
    print(f"Drew {len(panels)} panels with one key, rate {RATE}, into {args.out / 'mask_gallery.png'}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
