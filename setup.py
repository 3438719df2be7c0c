"""Build of fastrec: the pure Python package, the Triton kernels and one C++ extension.

The C++ sources are globbed. Without a C++ compiler (or with FASTREC_NO_EXTENSION=1) the package
still installs and the reference backend serves CPU tensors.
"""

import os
import shutil
from glob import glob

from setuptools import setup


def extension_arguments() -> dict:
    if os.environ.get("FASTREC_NO_EXTENSION") == "1":
        return {}
    if not shutil.which(os.environ.get("CXX", "g++").split()[0]):
        print("fastrec: no C++ compiler found, installing without the cpp backend")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        "fastrec._C",
        sorted(glob("csrc/**/*.cpp", recursive=True)),
        include_dirs=[os.path.abspath("csrc/common")],
        extra_compile_args=[
            "-O3",
            "-fopenmp",
            "-fopenmp-simd",
            "-std=c++17",
            "-Wall",
            "-Wno-psabi",
        ],
        extra_link_args=["-fopenmp"],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)},
    }


PACKAGES = (
    "",
    ".ops",
    ".ops.common",
    ".kernels",
    ".kernels.common",
    ".nn",
    ".nn.encoders",
    ".objectives",
    ".data",
    ".data.prepare",
    ".data.steps",
    ".evaluation",
    ".training",
    ".recipes",
)

setup(
    packages=[f"fastrec{name}" for name in PACKAGES],
    # `kernels/` stays a top-level folder of the repository but never a top-level package: that name
    # is taken on PyPI and imported by others.
    package_dir={"fastrec": "fastrec", "fastrec.kernels": "kernels"},
    package_data={"fastrec.recipes": ["*.yaml"], "fastrec": ["py.typed"]},
    **extension_arguments(),
)
