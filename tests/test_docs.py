"""Every example that a reader may copy runs: docstrings, README and the pages in docs/."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import dropjax
from dropjax import _names

ROOT = Path(__file__).parent.parent
MODULES = ["dropjax", *sorted(m.name for m in pkgutil.walk_packages(dropjax.__path__, "dropjax."))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    known = {"jax": jax, "jnp": jnp, "np": np, "nn": nn, "nnx": nnx}
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=known, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run in order, in one namespace, then the cells of a column named code."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks(page, "python") + code_column(page):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the other library
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("library", ["haiku", "equinox", "keras"])
def test_monte_carlo_through_another_library(library, monkeypatch, tmp_path):
    """The block that needs the library runs after the first, and its summary is that of a loop."""
    if "keras" not in sys.modules:
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    pytest.importorskip(library)
    page = ROOT / "docs" / "monte_carlo.md"
    namespace = {}
    for block in blocks(page, "python")[:1] + blocks(page, f"python {library}"):
        exec(compile(block, page.name, "exec"), namespace)
    apply = {"haiku": lambda key: namespace["transformed"].apply(namespace["params"], key, namespace["x"])}
    fn = apply.get(library, namespace.get("fn"))
    loop = [jax.nn.softmax(fn(jax.random.fold_in(namespace["key"], t))) for t in range(100)]
    np.testing.assert_allclose(namespace["summary"].probabilities, np.mean(loop, axis=0), atol=1e-6)
    assert np.ptp(loop, axis=0).max() > 0.1


def code_column(page):
    """The cells in backticks of the columns that are called code."""
    found, column = [], None
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if not cells:
            column = None
        elif column is None:
            column = cells.index("code") if "code" in cells else -1
        elif column >= 0 and cells[0].startswith("`"):
            found.append(cells[column].strip("`"))
    return found


def test_every_variant_has_a_row_with_code():
    code = code_column(ROOT / "docs" / "variants.md")
    called = {cell.partition("(")[0] for cell in code}
    assert {n for n, f in vars(dropjax).items() if inspect.isfunction(f)} - {"keep_mask", "apply_mask"} <= called


def tables_of_names():
    """The tables of `dropjax._names` as docs/flax.md shows them."""
    names = ["| typed | library | function | layer | |", "|---|---|---|---|---|"]
    for row in _names.NAMES:
        function, layer = f"`dropjax.{row.function}`", f"`{row.layer}`" if row.layer else ""
        names.append(f"| {words(row.typed)} | {row.library} | {function} | {layer} | {row.remark} |".replace("  ", " "))
    keywords = ["| keyword | here |", "|---|---|"]
    for row in _names.KEYWORDS:
        typed = row.typed.split()[0]
        here = "; ".join(f"`{ours}`: {meaning.format(typed=typed)}" for ours, meaning in row.here.items() if ours)
        keywords.append(f"| {words(row.typed)} | {'. '.join(filter(None, [here, row.here.get('', '')]))} |")
    return "\n".join(names), "\n".join(keywords)


def words(typed):
    return ", ".join(f"`{word}`" for word in typed.split())


def test_the_page_of_flax_shows_all_names():
    """Where this fails, put what `tables_of_names()` returns into the page."""
    page = (ROOT / "docs" / "flax.md").read_text()
    assert all(table in page for table in tables_of_names())


def test_the_first_shell_block_holds_two_commands():
    lines = [line for line in blocks(ROOT / "README.md", "bash")[0].splitlines() if line.strip()]
    assert len(lines) == 2
    assert "examples/mc_digits.py" in lines[0]
    assert "pytest" in lines[1]


def test_links_within_the_repository_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_the_main_job_runs(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "mc_digits.py"), "--out", str(tmp_path)]
    command += ["--steps", "60", "--samples", "10", "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "AUROC" in run.stdout
    assert (tmp_path / "mc_digits.png").stat().st_size > 50_000
    assert (tmp_path / "mc_digits.json").exists()
