"""What setup.py makes of a few files, and says where it can't: nothing here compiles the extension."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
for needed in ("cmake", "ninja", "pybind11"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parent.parent
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
PYPROJECT = """
project = { name = "quark_fast", version = "1" }
tool.setuptools.packages = ["quark_fast"]
"""
# Writes in the module's place which compiler CMake took, if it took one.
CMAKE = f"""
cmake_minimum_required(VERSION 3.24)
project(quark_fast LANGUAGES NONE)
file(WRITE ${{CMAKE_LIBRARY_OUTPUT_DIRECTORY}}/{MODULE} "${{CMAKE_CXX_COMPILER}}")
"""
# What no compiler before GCC 11 and clang 12 takes.
OLD_COMPILER = """#!/bin/sh
case "$*" in *-march=x86-64-v*) echo "bad value for -march" >&2; exit 1;; esac
exec c++ "$@"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with a package of two modules, and a CMakeLists.txt that compiles nothing."""
    package = tmp_path / "clone" / "quark_fast"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", package.parent)
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    (package.parent / "CMakeLists.txt").write_text(CMAKE)
    for name in ("__init__.py", "gone.py"):
        (package / name).touch()
    return package.parent


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What Python did with these arguments in this folder."""
    others = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=others | environment, capture_output=True, text=True)


def build(clone: Path, *arguments: str, **environment: str) -> dict[str, str]:
    """The files of the package as ``setup.py build`` left them for a wheel."""
    done = python(clone, "setup.py", "build", *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (package,) = clone.glob("build/lib*/quark_fast")
    return {path.name: path.read_text() for path in package.iterdir()}


def another_compiler(folder: Path, script: str = '#!/bin/sh\nexec c++ "$@"\n') -> str:
    compiler = folder / "another-c++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    return str(compiler)


def test_sdist_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("csrc", "quark_fast"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=ignored)
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, clone)
    sources = {str(path.relative_to(clone)) for path in clone.rglob("*") if path.is_file()}
    # A test alone, without the modules that it imports, is of no use.
    (clone / "tests").mkdir()
    shutil.copy(__file__, clone / "tests")

    done = python(clone, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')")
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (clone / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert held - made == sources


def test_module_that_is_gone_from_the_sources_is_gone_from_the_wheel(clone: Path) -> None:
    assert build(clone).keys() == {"__init__.py", "gone.py", MODULE}
    (clone / "quark_fast" / "gone.py").unlink()
    kept = {path: path.stat().st_mtime_ns for path in clone.glob(f"build/kept/*/{MODULE}")}
    assert build(clone).keys() == {"__init__.py", MODULE}
    assert {path: path.stat().st_mtime_ns for path in clone.glob(f"build/kept/*/{MODULE}")} == kept
    assert len(kept) == 1, "what was compiled is not compiled again"


def test_clone_that_was_moved_builds_again(clone: Path) -> None:
    build(clone)
    moved = clone.rename(clone.with_name("moved"))
    assert MODULE in build(moved, "--force")


def test_another_compiler_is_taken_in_a_clone_that_was_built(clone: Path) -> None:
    (clone / "CMakeLists.txt").write_text(CMAKE.replace("NONE", "CXX"))
    first = build(clone)[MODULE]
    another = another_compiler(clone)
    assert build(clone, CXX=another)[MODULE] == another != first
    assert build(clone)[MODULE] == first


def test_second_build_keeps_what_cmake_knows(clone: Path) -> None:
    """A developer's change to one source compiles that one, not all."""
    build(clone)
    (known,) = clone.glob("build/temp*/*/CMakeFiles")
    (known / "mark").touch()
    build(clone, "--force")
    assert (known / "mark").exists()


@pytest.mark.parametrize("environment", [{"PATH": "/nonexistent"}, {"CXX": "/nonexistent/c++"}])
def test_missing_compiler_is_named_with_the_mend(clone: Path, environment: dict[str, str]) -> None:
    done = python(clone, "setup.py", "build", **environment)
    missing = environment.get("CXX", "c++")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        f"error: quark_fast needs a C++17 compiler, and there is no {missing}: install one "
        "(apt install g++), or name yours (CXX=/path/to/g++ pip install ...)"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
def test_compiler_without_the_levels_is_told_which_one_has_them(clone: Path) -> None:
    for name in ("CMakeLists.txt", "csrc"):
        (clone / name).unlink(missing_ok=True)
        (clone / name).symlink_to(ROOT / name)
    done = python(clone, "setup.py", "build", CXX=another_compiler(clone, OLD_COMPILER))
    said = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "needs GCC 11, clang 12 or newer" in said and str(clone / "another-c++") in said
    assert "Traceback" not in said
