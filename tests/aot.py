# SPDX-License-Identifier: Apache-2.0
"""Compile a Triton kernel for a GPU that is not here and read what ptxas made of it.

A spill shows as STACK > 0 and as LDL/STL in the SASS (the LOCAL field of cuobjdump stays 0). This
must run without TRITON_INTERPRET: the decorator then returns kernels that cannot be compiled.
"""

import gzip
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from fastrec.kernels.common.linear_scores import config_of

# Shared memory that one program may use, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Name: dtypes of the activations and of the table.
TYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
POINTER = {torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16"}
WIDTHS = (64, 128, 256, 1024)  # above 256 in chunks
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def missing_tools() -> str | None:
    """Why nothing can be compiled or inspected here; None if all is present."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: interpreted kernels cannot be compiled"
    absent = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (BIN / name).exists()]
    return f"triton {triton.__version__} comes without {', '.join(absent)}" if absent else None


needs_compiler = pytest.mark.skipif(missing_tools() is not None, reason=missing_tools() or "")


def case(*values, plain: bool):
    """A case of the smoke run, of `make test` (compute capability 9.0) or of `make test-all`: 828
    compilations of 0.6 s each, of which those for other GPUs seldom tell more."""
    marks = [] if plain else [pytest.mark.slow]
    if not plain and {80, 100} & {value for value in values if isinstance(value, int)}:
        marks.append(pytest.mark.exhaustive)
    return pytest.param(*values, marks=marks)


def take_options(config: dict) -> dict:
    """What a configuration says to the compiler; the rest, left in it, are arguments."""
    return {key: config.pop(key) for key in ("num_warps", "num_stages") if key in config}


@dataclass(frozen=True)
class Binary:
    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, opcode: str) -> int:
        return len(re.findall(rf"\s{opcode}\b", self.sass))

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.count("LDL") > 0 or self.count("STL") > 0

    @property
    def product(self) -> str:
        """The instruction that multiplies matrices; empty where there is none."""
        found = [name for name in ("HGMMA", "UTCHMMA", "HMMA", "FFMA") if self.count(name)]
        return found[0] if found else ""

    def assert_fits(self, capability: int) -> None:
        """No register is spilled, and a program's memory is there."""
        assert not self.spills, f"{self.registers} registers, {self.stack} bytes of stack"
        limit = SHARED_LIMIT[capability]
        assert self.shared <= limit, (
            f"{self.shared} bytes of shared memory, sm_{capability}: {limit}"
        )

    def assert_wgmma(self) -> None:
        assert self.count("HGMMA") > 0, "the products do not use wgmma"


def compile_for(capability: int, kernel, arguments: dict[str, object], **options) -> Binary:
    """`arguments`: a type name ("*bf16", "i32") for what varies at run time, with ":16" appended
    where the launcher finds a multiple of 16; any other value is compiled in, as are None and 1."""
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, str) and re.match(r"\*|i\d+|fp\d+", value):
            kind, _, multiple = value.partition(":")
            signature[name] = kind
            if multiple:
                attributes[(position,)] = [["tt.divisibility", int(multiple)]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    unknown = set(arguments) - set(kernel.arg_names)
    assert not unknown, f"{kernel.__name__} has no arguments {sorted(unknown)}"
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        sass = _disassembled(cubin)
    field = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Binary(field["REG"], field["STACK"], compiled.metadata.shared, sass)


def _disassembled(cubin: Path) -> str:
    """Kept in Triton's cache: nvdisasm takes longer than Triton, which keeps what it compiled."""
    content = cubin.read_bytes() + triton.__version__.encode()
    cache = get_cache_manager(hashlib.sha256(content).hexdigest())
    if (kept := cache.get_file("sass.gz")) is not None:
        return gzip.decompress(Path(kept).read_bytes()).decode()
    sass = _tool("nvdisasm", "--print-code", "--no-dataflow", cubin)
    cache.put(gzip.compress(sass.encode()), "sass.gz")
    return sass


def print_table(names: str, cases: list, build: Callable[..., Binary], product: str = "") -> None:
    """The rows of the documents: the values of a case, the last of them its capability, and what
    `build` of them is. `names`: of the other values; `product`: of a column for the instruction."""
    heads = [*names.split(), "sm", "registers", "stack", "shared, bytes", *filter(None, [product])]
    print("|", " | ".join(heads), "|")
    print("|" + "---|" * len(heads))
    for values in (case.values for case in cases):
        binary = build(*values)
        cells = [*values, binary.registers, binary.stack, binary.shared, binary.product]
        print("|", " | ".join(map(str, cells[: len(heads)])), "|", flush=True)


def _tool(name: str, *arguments) -> str:
    command = [str(BIN / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def score_arguments(types: str, width: int, capability: int) -> tuple[dict, dict]:
    """What both ranking ops pass: contiguous tensors, a bias, exclusions. (arguments, options)"""
    dtype, table = TYPES[types]
    config = config_of(width, table, capability)
    options = take_options(config)
    arguments = dict(x=POINTER[dtype], w=POINTER[table], bias=POINTER[table], d="i32:16")
    arguments |= dict(stride_xn="i32:16", stride_xd=1, stride_wv="i32:16", stride_wd=1, stride_b=1)
    arguments |= dict(listed="*i64:16", offsets="*i64:16", n="i32", v="i32", per_range="i32")
    return arguments | config, options
