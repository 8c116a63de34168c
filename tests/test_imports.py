"""What may import what, and that importing does nothing else."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import quark_fast

PACKAGE = Path(quark_fast.__file__).parent

# Imports go down only: a package imports its own modules and those of the packages below it.
LAYERS = [
    {"__main__", "train", "evaluate", "generate", "ablate", "completion", "terminal"},
    {"ablation"},
    {"training"},
    {"evaluation"},
    {"rollout", "tasks"},
    {"rewards"},
    {"model"},
    {"data"},
    {"pool", "ops", "report"},
    {"metrics", "runtime"},
    {"arguments"},
    {"config"},
    {"settings", "keep_best", "near_names"},
    {"errors"},
    {"files"},
    {"_C"},
]
LAYER = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}


@functools.cache
def modules() -> list[str]:
    """Dotted names of every module of the package but its root."""
    files = (path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py")))
    names = [".".join(file.parts).removesuffix("__init__").rstrip(".") for file in files]
    return [name for name in names if name]


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(source_of(name))


def part(dotted: str) -> str:
    """The package that a module stands in: ops.loss -> ops."""
    return "__main__" if dotted.endswith("__main__") else dotted.split(".")[0]


def own_imports(name: str) -> Iterator[str]:
    """Modules of the package that a module imports anywhere in its source, also inside functions."""
    known = {*modules(), "_C"}
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide the layer"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [i for i in inner if i.removeprefix("quark_fast.") in known] or [str(node.module)]
        else:
            continue
        yield from (n.removeprefix("quark_fast.") for n in found if n.startswith("quark_fast."))


def others_imports(name: str) -> Iterator[tuple[str, bool]]:
    """Other people's packages that a module imports, and whether it does so when it is imported itself."""
    tree = tree_of(name)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    later = {inner for node in ast.walk(tree) if isinstance(node, functions) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for package in {dotted.split(".")[0] for dotted in found}:
            if package != "quark_fast" and package not in sys.stdlib_module_names:
                yield package, node not in later


def test_every_package_that_is_imported_is_a_dependency() -> None:
    """What others bring along may go one day; what only an extra brings is not needed at once."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    named = {
        name: set(map(distribution_of, lines)) for name, lines in project["optional-dependencies"].items()
    }
    always = set(map(distribution_of, project["dependencies"]))
    extras = set().union(*(of for name, of in named.items() if name not in ("test", "dev")))
    brought_by = packages_distributions()
    for name in modules():
        for package, at_once in others_imports(name):
            by = {distribution_of(one) for one in brought_by.get(package, [package])}
            assert by & (always if at_once else always | extras), f"{name} imports {package}"


def distribution_of(requirement: str) -> str:
    """The name as PyPI compares it: "Foo_Bar>=1" is foo-bar."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def test_every_package_has_a_layer() -> None:
    assert {part(name) for name in modules()} == LAYER.keys() - {"_C"}


@pytest.mark.parametrize("name", modules())
def test_no_module_imports_from_a_layer_above(name: str) -> None:
    upward = [other for other in own_imports(name) if LAYER[part(other)] < LAYER[part(name)]]
    assert not upward, f"{name} imports {upward}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {name: sorted(set(own_imports(name)) - {name}) for name in modules()}
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name not in order:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            order.append(name)

    for name in graph:
        visit(name, ())


def test_no_package_but_the_first_has_code_in_its_init() -> None:
    for path in sorted(PACKAGE.glob("*/__init__.py")):
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), path


def source_of(name: str) -> str:
    path = PACKAGE.joinpath(*name.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def code_lines(node: ast.AST, lines: list[str]) -> int:
    """Lines of a function or class without blank ones, comments and docstrings."""
    docstrings = {
        line
        for inner in ast.walk(node)
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant)
        for line in range(inner.lineno, inner.end_lineno + 1)
    }
    numbers = range(node.lineno, node.end_lineno + 1)
    return sum(
        1 for n in numbers if n not in docstrings and lines[n - 1].strip() and lines[n - 1].strip()[0] != "#"
    )


@pytest.mark.parametrize("name", modules())
def test_text_files_are_of_one_encoding_whatever_the_locale_is(name: str) -> None:
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            mode = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            opened = node.func.attr == "open" and mode in ("r", "w", "a", "x")
            if opened or node.func.attr in ("read_text", "write_text"):
                given = {keyword.arg for keyword in node.keywords}
                assert "encoding" in given or None in given, f"line {node.lineno}"


@pytest.mark.parametrize("name", modules())
def test_nothing_is_too_long_to_hold_in_mind(name: str) -> None:
    """Classes of 300 lines, functions of 60 lines of code and 8 arguments, at most.

    Kernels and the public losses may have more, and so may the list of what a public class is made with.
    """
    if part(name) == "ops":
        return
    lines = source_of(name).splitlines()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 300, node.name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__":
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([one for one in given if one.arg not in ("self", "cls")]) <= 8, node.name
            assert code_lines(node, lines) <= 60, node.name


def test_only_the_commands_print() -> None:
    # assets speaks on standard error while it downloads: somebody is waiting.
    for name in modules():
        calls = [n for n in ast.walk(tree_of(name)) if isinstance(n, ast.Call)]
        printing = any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls)
        assert not printing or part(name) in LAYERS[0] or name == "data.assets", f"{name} prints"


def in_a_new_process(source: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_shown_before_they_are_first_used() -> None:
    """By completion in a notebook, which asks dir()."""
    shown = in_a_new_process("import quark_fast; print(*dir(quark_fast))").split()
    assert {name for name in shown if not name.startswith("_")} == {*quark_fast.__all__}


def test_importing_the_package_alone_loads_neither_torch_nor_transformers() -> None:
    loaded = in_a_new_process("import sys, quark_fast; print(*sys.modules)").split()
    assert "quark_fast" in loaded
    assert not {"torch", "transformers", "numpy", "matplotlib"} & {name.split(".")[0] for name in loaded}


@pytest.mark.parametrize("change", ["_C.interface -= 1", "del _C.interface"])
def test_compiled_part_of_another_version_is_refused_with_the_mend(change: str) -> None:
    """Calls would fail in the middle of a run, on their arguments."""
    told = in_a_new_process(
        f"""
import importlib
import quark_fast
from quark_fast import _C
{change}
try:
    importlib.reload(quark_fast)
except ImportError as error:
    print(error)
"""
    )
    assert told == (
        "the compiled part of quark_fast is of another version than the package: "
        "run `pip install -e .` again\n"
    )


def test_help_and_bad_flags_do_not_wait_for_torch() -> None:
    source = """
import contextlib, importlib, sys
for command in ("train", "generate", "evaluate", "completion"):
    main = importlib.import_module(f"quark_fast.{command}").main
    for flag in ("--help", "--no-such-flag"):
        with contextlib.suppress(SystemExit):
            main([flag])
        print(command, flag, "torch" in sys.modules)
"""
    shown = in_a_new_process(source)
    for command in ("train", "generate", "evaluate", "completion"):
        for flag in ("--help", "--no-such-flag"):
            assert f"{command} {flag} False\n" in shown


def test_the_loss_and_the_pool_load_no_transformers() -> None:
    loaded = in_a_new_process(
        "import sys\nfrom quark_fast import RolloutPool, quark_loss\nprint(*sys.modules)"
    ).split()
    assert "torch" in loaded
    assert not {"transformers", "accelerate", "matplotlib", "triton"} & {
        name.split(".")[0] for name in loaded
    }


def test_every_public_name_exists_and_no_other() -> None:
    for name in quark_fast.__all__:
        assert getattr(quark_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Traner'"):
        _ = quark_fast.Traner


# Runs in a process of its own: the libraries are loaded first, so that what changes is ours.
QUIET = """
import importlib, os, random, signal, socket, sys
import accelerate, numpy as np, torch, transformers
import rich.live, rich.progress, transformers.hf_argparser

def no_network(*args, **kwargs):
    raise AssertionError(f"an import opened a socket: {args}")

socket.socket.connect = no_network
socket.getaddrinfo = no_network

def state():
    names, keys, *rest = np.random.get_state()
    return {
        "torch's RNG": torch.random.get_rng_state().tolist(),
        "numpy's RNG": (names, keys.tolist(), rest),
        "Python's RNG": random.getstate(),
        "the threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "the default dtype": torch.get_default_dtype(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "the environment": dict(os.environ),
        "signal handlers": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "the working folder": os.getcwd(),
        "transformers' verbosity": transformers.logging.get_verbosity(),
    }

torch.set_num_threads(3)
torch.manual_seed(5)
for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    after = state()
    changed = [what for what in before if before[what] != after[what]]
    assert not changed, f"importing {name} changed {changed}"
"""


def test_importing_any_module_changes_no_global_state_and_needs_no_network() -> None:
    names = [f"quark_fast.{name}" for name in modules()]
    done = subprocess.run([sys.executable, "-c", QUIET, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == "", "importing printed something"
