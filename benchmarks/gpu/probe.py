# SPDX-License-Identifier: Apache-2.0
"""Section `probe`: the ceilings that floors are computed from, measured on this device.

Rates are per second: bytes of a copy (read and written), floating point operations of a matrix
product, exponentials of a kernel that does nothing else.
"""

import subprocess

import torch
import triton
import triton.language as tl

from benchmarks.gpu.clock import Clock, rate
from benchmarks.gpu.context import Context

# Dtype -> {rate: products of that kind for each}, of which the fastest counts: float32 to float32
# accuracy by itself or by three products of its halves.
MATRIX = {"bfloat16": {"bf16": 1}, "float16": {"bf16": 1}, "float32": {"fp32": 1, "bf16": 3}}


@triton.jit
def _exp_kernel(out, CALLS: tl.constexpr, BLOCK: tl.constexpr):
    """CALLS exponentials for each of BLOCK numbers, each of the one before."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = index.to(tl.float32) * 1e-9
    for _ in range(CALLS):
        x = tl.exp2(-x)
    tl.store(out + index, x)


def _exponentials(context: Context, clock: Clock, rounds: int) -> dict:
    programs, calls, block = (2, 3, 16) if context.tiny else (132 * 64, 512, 1024)
    out = torch.empty(programs * block, device=context.device)

    def call():
        _exp_kernel[(programs,)](out, CALLS=calls, BLOCK=block, num_warps=4)

    row = rate(clock, call, programs * calls * block, rounds)
    # x = 2^-x has one fixed point, 0.6412, that every lane approaches.
    if not context.tiny and not (out - 0.641186).abs().max() < 1e-3:
        return {"failed": "wrong result"}
    return row


def _product(context: Context, clock: Clock, kind: str, rounds: int) -> dict:
    size = 32 if context.tiny else {"bf16": 8192, "tf32": 8192, "fp32": 4096}[kind]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    generator = torch.Generator(context.device).manual_seed(0)
    a, b = (
        torch.randn(size, size, generator=generator, device=context.device).to(dtype)
        for _ in range(2)
    )
    products = torch.backends.cuda.matmul
    before = products.fp32_precision  # "none" says something else to kernels than "ieee"
    products.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        return rate(clock, lambda: a @ b, 2 * size**3, rounds)
    finally:
        products.fp32_precision = before


def _copy(context: Context, clock: Clock, rounds: int) -> dict:
    size = 1024 if context.tiny else 2**32
    source = torch.empty(size, dtype=torch.int8, device=context.device).random_(0, 100)
    target = torch.empty_like(source)
    return rate(clock, lambda: target.copy_(source), 2 * size, rounds)


def _smi(what: str) -> str | None:
    """What nvidia-smi says of the first device; None where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def sm_clock(context: Context) -> dict:
    """{"clock_mhz"} of the multiprocessors, right behind what was measured."""
    clock = _smi("clocks.sm") if context.cuda else None
    return {"clock_mhz": int(clock)} if clock and clock.isdigit() else {}


def _properties(context: Context) -> dict:
    if not context.cuda:
        return {"name": "CPU tensors"}
    found = torch.cuda.get_device_properties(0)
    row = {
        "name": found.name,
        "driver": _smi("driver_version"),
        "ptxas": triton.knobs.nvidia.ptxas.version,
        "largest_clock_mhz": _smi("clocks.max.sm"),
        "power_limit_w": _smi("power.limit"),
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "cudnn": torch.backends.cudnn.version(),
    }
    for name in ("L2_cache_size", "clock_rate", "memory_clock_rate"):
        if hasattr(found, name):
            row[name] = getattr(found, name)
    return row


def probe(context: Context) -> None:
    clock, rounds = Clock(context.device), 2 if context.tiny else 15
    measurements = {
        "device": lambda: _properties(context),
        "copy": lambda: _copy(context, clock, rounds),
        "bf16": lambda: _product(context, clock, "bf16", rounds),
        "tf32": lambda: _product(context, clock, "tf32", rounds),
        "fp32": lambda: _product(context, clock, "fp32", rounds),
        "exp": lambda: _exponentials(context, clock, rounds),
    }
    for key, measurement in measurements.items():
        context.attempt(key, measurement)
