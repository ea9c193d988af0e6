"""The habits of the house, as tests over everything that is exported."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dropjax
import dropjax.constraints
import dropjax.linen
import dropjax.mc
import dropjax.nnx
import dropjax.schedules
import dropjax.training
from dropjax import bits, mc, sharding
from dropjax.mc import plots
from tests.variants import OTHERS, VARIANTS

PACKAGE = Path(dropjax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = [
    "_checks",
    "_names",
    "_arguments",
    "_tracing",
    "_watch",
    "sharding",
    "bits",
    "masks",
    "functional",
    "_flax_attention",
    "_drawing",
    "_layers",
    "linen",
    "nnx",
    "schedules",
    "constraints",
    "mc",
    "_checkpoints",
    "_step",
    "training",
]
FUNCTIONS = {name: f for name, f in vars(dropjax).items() if inspect.isfunction(f)}
MODULES = [dropjax, dropjax.linen, dropjax.nnx, dropjax.schedules, dropjax.constraints, dropjax.mc, mc.moments, plots]
MODULES += [dropjax.training]
PUBLIC = {
    f"{module.__name__}.{name}": thing
    for module in MODULES
    for name, thing in vars(module).items()
    if (inspect.isfunction(thing) or inspect.isclass(thing))
    and name[0] != "_"
    and thing.__module__.startswith("dropjax")
} | {f"{f.__module__}.{f.__name__}": f for f in [bits.random_words, bits.threefry2x32, sharding.assert_masks_differ]}
public = pytest.mark.parametrize("thing", PUBLIC.values(), ids=PUBLIC.keys())


def room(path):
    """The room of the house a file stands in: its place in the order of imports."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in FILES if p != PACKAGE / "__init__.py"], ids=lambda p: str(p.name))
def test_imports_point_one_way(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dropjax"):
            inner = (node.module or "").split(".")[1:]
            names = [inner[0]] if inner else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dropjax.")]
        for name in names:
            assert ORDER.index(name) < ORDER.index(room(path)) or name == room(path)


def test_every_room_has_its_place():
    assert {room(p) for p in FILES} - {"__init__"} == set(ORDER)


def test_importing_dropjax_is_light():
    heavy = ["flax", "optax", "chex", "matplotlib", "tqdm", "orbax", "sklearn"]
    code = f"import sys, dropjax; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in OTHERS])
def test_every_variant_has_a_row_and_the_signature(name):
    assert name in {row.function.__name__ for row in VARIANTS.values()}
    parameters = list(inspect.signature(FUNCTIONS[name]).parameters.values())
    assert [p.name for p in parameters[:2]] == ["key", "x"]
    assert parameters[2].name in ("rate", "stddev", "beta")
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in parameters[3:])
    assert {"start", "sharded_dims"} <= {p.name for p in parameters}


@public
def test_docstrings(thing):
    documented = inspect.getdoc(thing) or ""
    assert re.match(r"[A-Z`].*[^.]\.(\n|$)", documented), "one sentence first"
    if not inspect.isfunction(thing):
        return
    parameters = set(inspect.signature(thing).parameters)
    args = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", documented, re.M | re.S)
    described = set(re.findall(r"^  ([\w, ]+): ", args[1], re.M)) if args else set()
    described = {name.strip() for names in described for name in names.split(",")}
    assert parameters == described
    for section in ["Returns:"] if "generator" not in thing.__name__ and thing.__name__ != "replace_flax" else []:
        assert section in documented
    headings = [h for h in ["Args", "Returns", "Raises", "Example", "Reference"] if f"\n{h}:" in documented]
    positions = [documented.index(f"\n{h}:") for h in headings]
    assert positions == sorted(positions)


@public
def test_annotations(thing):
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert all(p.annotation is not p.empty for p in signature.parameters.values())
        assert signature.return_annotation is not signature.empty


def lines_of_code(text):
    """Lines that are not blank, a comment, or of a docstring."""
    tree, lines = ast.parse(text), text.splitlines()
    code = {i for i, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, node.end_lineno + 1))
    return len(code)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.name))
def test_files(path):
    text = path.read_text()
    assert lines_of_code(text) <= 450
    assert "jax._src" not in text
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text)))
    assert "warnings.warn(" not in text or path.stem == "_checks"  # which knows the line of the user's
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert path.stem not in ("utils", "common", "helpers", "misc", "contrib")


def test_one_public_path_for_each_symbol():
    """What is exported is defined in the package once, and __init__ re-exports it by name."""
    homes = [(thing.__module__, thing.__qualname__) for thing in PUBLIC.values()]
    assert len(homes) == len(set(homes))
    for name, thing in FUNCTIONS.items():
        assert getattr(importlib.import_module(thing.__module__), name) is thing


def test_variant_rows_say_why():
    for row in VARIANTS.values():
        assert all(len(reason) > 15 for reason in row.not_for.values())
    assert set(OTHERS) <= set(FUNCTIONS)
    assert all(len(reason) > 15 for reason in OTHERS.values())
