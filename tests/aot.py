# SPDX-License-Identifier: Apache-2.0
"""Compile a Triton kernel for a GPU that is not here and read what ptxas made of it.

A spill shows as STACK > 0 (the LOCAL field of cuobjdump stays 0) and as LDL/STL in the SASS, which
is made where it is asked for alone: a fifth of the time. This must run without TRITON_INTERPRET:
the decorator then returns kernels that cannot be compiled.

`tests/test_aot_<op>.py` has the cases of an op, `tests/aot_tables.py` writes what they compile to
into the pages of docs/kernels/.
"""

import contextlib
import functools
import gzip
import hashlib
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from sass import PRODUCTS, Loop, main_loop
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from fastrec.kernels.common.linear_scores import config_of
from fastrec.kernels.common.tiles import FUSED

# Shared memory that one program may use, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Of a multiprocessor of all of them; a block takes RESERVED bytes of shared memory for itself.
REGISTERS, WARPS, BLOCKS, TENSOR_COLUMNS, RESERVED = 65536, 64, 32, 512, 1024
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
    """A case of the smoke run, of `make test` or of `make test-all`: a compilation takes 2 s of a
    core, and those for other GPUs than 9.0, of width 256, of mixed types, in IEEE precision and of
    the rules of "all" without one of them seldom tell more."""
    marks = [] if plain else [pytest.mark.slow]
    if not plain and {80, 100, 256, "bf16-fp32", "fp32-ieee", "none"} & {*values}:
        marks.append(pytest.mark.exhaustive)
    return pytest.param(*values, marks=marks)


def take_options(config: dict) -> dict:
    """What a configuration says to the compiler; the rest, left in it, are arguments."""
    return {key: config.pop(key) for key in ("num_warps", "num_stages") if key in config}


@dataclass(frozen=True)
class Binary:
    """registers and stack (bytes) of a thread; shared (bytes), columns of tensor memory and warps
    of a block of threads; elements: of the tile that a block makes in one round of its loop; wgmma:
    whether it multiplies by the instructions of sm_90."""

    capability: int
    registers: int
    stack: int
    shared: int
    columns: int
    warps: int
    elements: int
    wgmma: bool
    cubin: bytes

    @functools.cached_property
    def sass(self) -> str:
        """Kept in Triton's cache: nvdisasm may take longer than Triton, which keeps its own."""
        content = self.cubin + triton.__version__.encode()
        cache = get_cache_manager(hashlib.sha256(content).hexdigest())
        if (kept := cache.get_file("sass.gz")) is not None:
            return gzip.decompress(Path(kept).read_bytes()).decode()
        with _file(self.cubin) as cubin:
            sass = _tool("nvdisasm", "--print-code", "--no-dataflow", cubin)
        cache.put(gzip.compress(sass.encode()), "sass.gz")
        return sass

    def count(self, opcode: str) -> int:
        return len(re.findall(rf"\s{opcode}\b", self.sass))

    @property
    def spills(self) -> bool:
        return self.stack > 0

    @property
    def product(self) -> str:
        """The instruction that multiplies matrices; empty where there is none."""
        return next((name for name in PRODUCTS if self.count(name)), "")

    @functools.cached_property
    def loop(self) -> Loop:
        return main_loop(self.sass)

    def per_element(self, instructions: int) -> float:
        """Of a thread in a round of the loop -> of all threads, for each element of the tile."""
        return instructions * 32 * self.warps / self.elements

    @property
    def blocks(self) -> int:
        """Blocks of threads that fit on a multiprocessor at a time."""
        granule = 256  # registers of a warp are allocated in so many, warps in fours
        warps = REGISTERS // (-(-self.registers * 32 // granule) * granule) // 4 * 4
        room = SHARED_LIMIT[self.capability] + RESERVED
        fits = [BLOCKS, min(warps, WARPS) // self.warps, room // (self.shared + RESERVED)]
        return min(*fits, TENSOR_COLUMNS // self.columns if self.columns else BLOCKS)

    def assert_fits(self) -> None:
        """No register is spilled, and a program's memory is there. Of a kernel that needs too much
        tensor memory Triton 3.6 leaves nothing but its end."""
        assert not self.spills, f"{self.registers} registers, {self.stack} bytes of stack"
        limit = SHARED_LIMIT[self.capability]
        assert self.shared <= limit, (
            f"{self.shared} bytes of shared memory, sm_{self.capability}: {limit}"
        )
        assert self.columns <= TENSOR_COLUMNS, f"{self.columns} columns of tensor memory"


def compile_for(
    capability: int, kernel, arguments: dict, tile: str = "BLOCK_N BLOCK_V", **options
) -> Binary:
    """`arguments`: a type name ("*bf16", "i32") for what varies at run time, with ":16" appended
    where the launcher finds a multiple of 16; any other value is compiled in, as are None and 1.
    `tile`: the arguments whose product is the number of elements of a round of the main loop."""
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
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=options | FUSED
    )
    with _file(compiled.asm["cubin"]) as cubin:
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
    field = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    found, elements = compiled.metadata, math.prod(arguments[name] for name in tile.split())
    memory = (field["REG"], field["STACK"], found.shared, getattr(found, "tmem_size", 0) or 0)
    wgmma, cubin = "wgmma.mma_async" in compiled.asm["ptx"], compiled.asm["cubin"]
    return Binary(capability, *memory, found.num_warps, elements, wgmma, cubin)


@contextlib.contextmanager
def _file(cubin: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        yield path


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


@dataclass(frozen=True)
class Op:
    """The cases of an op. heads: names of the values of a case, of which the last one is the
    capability. wgmma: of which cases the products must use wgmma on sm_90. page: the file in
    docs/kernels/ if it has another name than the op."""

    name: str
    heads: str
    cases: list
    build: Callable[..., Binary]
    wgmma: Callable[..., bool] = lambda *values: False
    page: str = ""

    @property
    def shown(self) -> list[tuple]:
        """What a page shows and `aot_bounds.csv` bounds: cases of the smoke run, for all GPUs."""
        plain = {case.values[:-1] for case in self.cases if not case.marks}
        return [case.values for case in self.cases if case.values[:-1] in plain]


def machine_code_test(op: Op) -> Callable:
    """The test of every case: it fits, it uses wgmma, it stays below its bounds, and its row on the
    page is what this version of Triton makes of it."""
    import aot_tables

    shown = set(op.shown)
    parameters = [
        pytest.param(case.values, marks=case.marks, id="-".join(map(str, case.values)))
        for case in op.cases
    ]

    @needs_compiler
    @pytest.mark.parametrize("values", parameters)
    def test(values):
        binary = op.build(*values)
        binary.assert_fits()
        if values[-1] == 90 and op.wgmma(*values):
            assert binary.wgmma, "the products do not use wgmma"
        if values in shown:
            assert binary.count("LDL") == binary.count("STL") == 0
            aot_tables.check(op, values, binary)

    return test
