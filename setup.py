"""Where the packages lie, and the optional native part; all else is in pyproject.toml.

``pip install .`` is pure Python and needs no compiler. VITKERN_NATIVE=1 adds kernels/native, which
needs CMake and a C++ compiler; VITKERN_CUDA=1 beside it adds its CUDA sources, which need nvcc.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("VITKERN_NATIVE") == "1"
CUDA = os.environ.get("VITKERN_CUDA") == "1"


class BuildNative(build_ext):
    """Has CMake build the native library; setuptools only says where it goes."""

    def get_ext_filename(self, fullname: str) -> str:
        # A plain shared library for ctypes: no Python version belongs in its name.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise ExecError("VITKERN_NATIVE=1 needs cmake on PATH (pip install cmake)")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "VITKERN_NATIVE": "ON",
            "VITKERN_CUDA": "ON" if CUDA else "OFF",
            "VITKERN_LIBRARY": target,
        }
        subprocess.run(
            [cmake, "-S", ROOT, "-B", self.build_temp, *(f"-D{k}={v}" for k, v in options.items())],
            check=True,
        )
        subprocess.run(
            [cmake, "--build", self.build_temp, "--config", "Release", "--parallel"], check=True
        )


class NativeWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # Tied to the platform by its library, but to no version of Python.
        return "py3", "none", super().get_tag()[2]


native = {
    "ext_modules": [Extension("vitkern.kernels.native.vitkern_native", sources=[])],
    "cmdclass": {"build_ext": BuildNative, "bdist_wheel": NativeWheel},
}

setup(
    # `make` may have laid vitkern/kernels as a link: the packages there are the ones below.
    packages=[
        *find_packages(include=["vitkern", "vitkern.*"], exclude=["vitkern.kernels*"]),
        "vitkern.kernels",
        *(f"vitkern.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"vitkern.kernels": "kernels"},
    **(native if NATIVE else {}),
)
