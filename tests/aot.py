"""Compile a Triton kernel for a GPU that is not here and read what ptxas made of it.

A spill shows as STACK > 0 and as LDL/STL in the SASS (the LOCAL field of cuobjdump stays 0). This
must run without TRITON_INTERPRET: the decorator then returns kernels that cannot be compiled.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may use, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def missing_tools() -> str | None:
    """Why nothing can be compiled or inspected here; None if all is present."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: interpreted kernels cannot be compiled"
    absent = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (BIN / name).exists()]
    return f"triton {triton.__version__} comes without {', '.join(absent)}" if absent else None


needs_compiler = pytest.mark.skipif(missing_tools() is not None, reason=missing_tools() or "")


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
        sass = _tool("nvdisasm", "-c", cubin)
    field = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Binary(field["REG"], field["STACK"], compiled.metadata.shared, sass)


def _tool(name: str, *arguments) -> str:
    command = [str(BIN / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
