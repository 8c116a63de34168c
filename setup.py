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
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, PlatformError

HERE = Path(__file__).resolve().parent
KEPT = HERE / "build" / "kept"
HEEDED = ("AR", "CC", "CFLAGS", "CPATH", "CPLUS_INCLUDE_PATH", "CPPFLAGS", "CXX", "CXXFLAGS", "LDFLAGS")


class CMakeExtension(Extension):
    """An extension whose sources only CMakeLists.txt knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class BuildPackage(build_py):
    """Collect the package's files. setuptools leaves in build/lib what the sources no longer have."""

    def run(self) -> None:
        collected = Path(self.build_lib) / "quark_fast"
        if collected.exists() and not self.editable_mode:
            shutil.rmtree(collected)
        super().run()


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
        # CMake keeps path, compiler and flags of the first time, and refuses a folder that was moved.
        configured = build / "configured"
        now = repr((str(build), compiler(), settings()))
        same = configured.exists() and configured.read_text(encoding="utf-8") == now
        configured.unlink(missing_ok=True)  # until CMake is through
        # The programs of the build requirements, whether or not their folder is on PATH.
        run_cmake = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        configure = [
            run_cmake,
            *([] if same else ["--fresh"]),
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
        run(configure)
        configured.write_text(now, encoding="utf-8")
        run([run_cmake, "--build", str(build)])


def run(command: list[str]) -> None:
    """A traceback of ours would stand between the program's own error and the end."""
    status = subprocess.run(command, check=False).returncode
    if status:
        raise CompileError(f"{command[0]} ended with status {status}; its error stands above")


def compiler() -> list[str]:
    """The command that compiles C++."""
    usual = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    command = os.environ.get("CXX", "").split() or [next(filter(None, usual), "c++")]
    if not shutil.which(command[0]):
        raise PlatformError(
            f"quark_fast needs a C++17 compiler, and there is no {command[0]}: install one "
            "(apt install g++), or name yours (CXX=/path/to/g++ pip install ...)"
        )
    return command


def settings() -> list[tuple[str, str]]:
    """What CMake and compilers read of the environment."""
    return sorted((k, v) for k, v in os.environ.items() if k in HEEDED or k.startswith("CMAKE_"))


def fingerprint(debug: bool) -> str:
    """Of sources, compiler, Python and settings: equal ones give the same module."""
    digest = hashlib.sha256()
    for path in [HERE / "setup.py", HERE / "CMakeLists.txt", *sorted((HERE / "csrc").rglob("*"))]:
        if path.is_file():
            digest.update(f"{path.relative_to(HERE)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    about = subprocess.run([*compiler(), "-v"], capture_output=True, text=True, check=False)
    versions = (cmake.__version__, pybind11.__version__, sys.version, sysconfig.get_platform())
    made_by = (compiler(), about.stdout, about.stderr, platform.machine(), sysconfig.get_paths()["include"])
    digest.update(repr((debug, settings(), versions, made_by)).encode())
    return digest.hexdigest()[:20]


setup(
    ext_modules=[CMakeExtension("quark_fast._C")],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildWithCMake},
)
