"""Build `quark_fast._C` with CMake. Everything else about the package is in pyproject.toml.

What was built is kept in build/kept under a hash of all that it depends on, so that a second install from
this folder, of an extra say, compiles nothing again.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
KEPT = HERE / "build" / "kept"
# What CMake and compilers read of the environment.
HEEDED = ("AR", "CC", "CFLAGS", "CPATH", "CPLUS_INCLUDE_PATH", "CPPFLAGS", "CXX", "CXXFLAGS", "LDFLAGS")


class CMakeExtension(Extension):
    """An extension whose sources only CMakeLists.txt knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class BuildWithCMake(build_ext):
    """Configure, compile and put the module where setuptools expects it; any failure is raised."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        kept = KEPT / fingerprint(self.debug) / module.name
        if self.force or not kept.exists():
            self._compile(ext, module)
            kept.parent.mkdir(parents=True, exist_ok=True)
            scratch = kept.with_suffix(f".{os.getpid()}")
            shutil.copyfile(module, scratch)
            scratch.replace(kept)
            for other in set(KEPT.iterdir()) - {kept.parent}:  # of other sources: one is enough
                shutil.rmtree(other, ignore_errors=True)
        else:
            module.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept, module)

    def _compile(self, ext: Extension, module: Path) -> None:
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        # The programs of the build requirements, whether or not their folder is on PATH.
        run_cmake = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        configure = [
            run_cmake,
            "-S",
            str(HERE),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([run_cmake, "--build", str(build)], check=True)


def fingerprint(debug: bool) -> str:
    """Of sources, compiler, Python and settings: equal ones give the same module."""
    digest = hashlib.sha256()
    for path in [HERE / "setup.py", HERE / "CMakeLists.txt", *sorted((HERE / "csrc").rglob("*"))]:
        if path.is_file():
            digest.update(f"{path.relative_to(HERE)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    compiler = os.environ.get("CXX", "").split() or [shutil.which("c++") or shutil.which("g++") or "clang++"]
    about = subprocess.run([*compiler, "-v"], capture_output=True, text=True, check=False)
    settings = {k: v for k, v in os.environ.items() if k in HEEDED or k.startswith("CMAKE_")}
    versions = (cmake.__version__, pybind11.__version__, sys.version, sysconfig.get_platform())
    made_by = (compiler, about.stdout, about.stderr, platform.machine(), sysconfig.get_paths()["include"])
    digest.update(repr((debug, sorted(settings.items()), versions, made_by)).encode())
    return digest.hexdigest()[:20]


setup(ext_modules=[CMakeExtension("quark_fast._C")], cmdclass={"build_ext": BuildWithCMake})
