# SPDX-License-Identifier: Apache-2.0
"""Build of fastrec: the pure Python package, the Triton kernels and one C++ extension.

The extension uses the stable interfaces of Python (3.11) and torch (2.11) alone: one wheel serves
every later version of both. The C++ sources are globbed. Without a C++ compiler (or with
FASTREC_NO_EXTENSION=1) the package still installs and the reference backend serves CPU tensors; a
compiler that CXX names must exist.
"""

import os
import shlex
import shutil
import sys
from glob import glob

import setuptools

# Older ones, such as that of a new environment of Python 3.11, do not read `license` of
# pyproject.toml, and say so in thirty lines.
SETUPTOOLS = 77
if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
    raise SystemExit(
        f"fastrec: it is built by setuptools {SETUPTOOLS} or later, here is"
        f" {setuptools.__version__}: pip install 'setuptools>={SETUPTOOLS}'"
    )

# Last on the command line, so that they also win over CFLAGS and CXXFLAGS: a reordered sum or an
# approximate division bends the exponential, and a compiler that assumes that no number is infinite
# drops the masks. csrc/common/simd.h refuses what gets past them.
STRICT = ["-fno-fast-math", "-fno-finite-math-only", "-O3"]


def find_compiler() -> bool:
    """Whether there is one. CXX may begin with a launcher: "ccache g++"."""
    asked = os.environ.get("CXX")
    words = shlex.split(asked or "g++")
    missing = [word for word in words if not word.startswith("-") and not shutil.which(word)]
    if missing and asked:
        raise SystemExit(f"fastrec: CXX is {asked!r}, and there is no {missing[0]}")
    if missing:
        print(
            "fastrec: no g++ found: installing without the C++ kernels, CPU tensors will use the"
            " slower reference (CXX names another compiler)",
            file=sys.stderr,
        )
    if not missing and len(words) > 1:
        # torch takes CXX for the name of one program, and knows compilers by their names.
        wrapper = os.path.abspath("build/compiler/g++")
        os.makedirs(os.path.dirname(wrapper), exist_ok=True)
        with open(wrapper, "w") as file:
            file.write(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        os.chmod(wrapper, 0o755)
        os.environ["CXX"] = wrapper
    return not missing


def extension_arguments() -> dict:
    if os.environ.get("FASTREC_NO_EXTENSION") == "1" or not find_compiler():
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        "fastrec._C",
        sorted(glob("csrc/**/*.cpp", recursive=True)),
        include_dirs=[os.path.abspath("csrc/common")],
        py_limited_api=True,
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        extra_compile_args=[
            *("-fopenmp", "-fopenmp-simd", "-std=c++17", "-Wall", "-Wno-psabi"),
            "-fno-math-errno",  # nobody reads errno, and for its sake no square root is vectorised
            *STRICT,
        ],
        # What is for debuggers alone is nine tenths of the file: CFLAGS=-g1 keeps it.
        extra_link_args=[
            "-fopenmp",
            *STRICT,
            *([] if "-g" in os.environ.get("CFLAGS", "") else ["-Wl,-S"]),
        ],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
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
    ".integrations",
    ".training",
    ".recipes",
)

setuptools.setup(
    packages=[f"fastrec{name}" for name in PACKAGES],
    # `kernels/` stays a top-level folder of the repository but never a top-level package: that name
    # is taken on PyPI and imported by others.
    package_dir={"fastrec": "fastrec", "fastrec.kernels": "kernels"},
    package_data={"fastrec.recipes": ["*.yaml"], "fastrec": ["py.typed", "help/*.txt"]},
    **extension_arguments(),
)
