# SPDX-License-Identifier: Apache-2.0
"""The calls that gpu_evidence makes on CUDA only, with CUDA and the peers replaced by objects that
accept what the real ones accept."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.importorskip("triton")
from benchmarks import peers
from benchmarks.bench import Entry
from benchmarks.gpu import checks, probe
from benchmarks.gpu.cases import MEASURED
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.context import device_name
from benchmarks.gpu.ops import floor_seconds
from benchmarks.gpu.tune import TUNED, changed


class Event:
    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.clock += 2.0
        self.at = Event.clock

    def elapsed_time(self, other):
        return other.at - self.at  # milliseconds


@pytest.fixture
def cuda(monkeypatch):
    """Names of the calls, in order."""
    calls: list = []

    def note(name, value=None):
        monkeypatch.setattr(
            torch.cuda, name, lambda *_, **__: calls.append(name) or value, raising=False
        )

    for name in ("synchronize", "_sleep", "reset_peak_memory_stats", "empty_cache"):
        note(name)
    note("memory_allocated", 100)
    note("max_memory_allocated", 350)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return calls


def test_clock(cuda):
    clock = Clock("cpu")
    clock.cuda = True
    assert clock.seconds(lambda: cuda.append("call")) == pytest.approx(2e-3)
    assert cuda == ["_sleep", "call", "synchronize"]
    cuda.clear()
    clock.seconds(lambda: cuda.append("call"), lead=False)
    assert cuda == ["synchronize", "call", "synchronize"]
    assert clock.peak_bytes(lambda: None) == 250


def test_capture(cuda, monkeypatch):
    @contextmanager
    def within(*_):
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "graph", within)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    calls = []
    graph, results = checks.captured(lambda: calls.append(1) or {"x": len(calls)}, cuda=True)
    assert graph == "graph" and results == {"x": 3}


@pytest.mark.parametrize(
    "name, file", [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("", "cuda")]
)
def test_device_name(name, file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device_name("cuda") == file


def test_floor_is_the_slowest_unit():
    rates = {"bf16": 100.0, "copy": 10.0, "exp": 1.0}
    assert floor_seconds(rates, "bfloat16", 500.0, 20.0, 3.0) == (5.0, "bf16")
    assert floor_seconds(rates, "bfloat16", 100.0, 20.0, 3.0) == (3.0, "exp")
    # Float32 by three products of halves where that is faster.
    assert floor_seconds(rates | {"bf16": 96.0}, "float32", 480.0, 20.0, 3.0) == (15.0, "bf16")
    assert floor_seconds(rates | {"fp32": 50.0}, "float32", 500.0, 20.0, 3.0) == (10.0, "fp32")
    assert floor_seconds({"bf16": 100.0}, "bfloat16", 100.0, 20.0, 3.0) == (None, None)
    assert {rate for rates in probe.MATRIX.values() for rate in rates} == {"bf16", "fp32"}


def test_floors_of_the_note():
    """4096 x 1M x 64 on 989 TFLOP/s, 3.87 T exponentials/s and 4.8 TB/s: 2.12 ms."""
    entry = MEASURED["linear_ce"].entries[0]
    counts = MEASURED["linear_ce"].floor(entry)["both"]
    seconds, limit = floor_seconds(
        {"bf16": 989e12, "copy": 4.8e12, "exp": 3.87e12}, "bfloat16", *counts
    )
    assert limit == "bf16" and seconds == pytest.approx(2.12e-3, rel=0.01)


def test_floors_of_ranking_and_of_drawn_items():
    rates = {"bf16": 989e12, "copy": 4.8e12, "exp": 3.87e12}
    for entry in MEASURED["rank_topk"].entries[:3]:
        counts = MEASURED["rank_topk"].floor(entry)["forward"]
        seconds, limit = floor_seconds(rates, "bfloat16", *counts)
        assert limit == "bf16" and seconds == pytest.approx(0.53e-3, rel=0.01)
    assert MEASURED["rank_topk"].ops == ("linear_rank", "linear_topk")
    dense, _, sparse = (
        MEASURED["sampled"].floor(entry)["both"] for entry in MEASURED["sampled"].entries[:3]
    )
    pairs = 2560 * 257  # of them 482 K distinct items
    assert dense == (6 * pairs * 64, 128 * (pairs + 10**6), pairs)
    assert sparse[1] == pytest.approx(256 * (pairs + 482_000), rel=1e-3)


@pytest.mark.parametrize("name", TUNED)
def test_candidates_name_what_the_kernel_has(name):
    tuned, half = TUNED[name], torch.bfloat16
    kernels = importlib.import_module(f"fastrec.kernels.{tuned.op}")
    arguments = {
        "linear_cross_entropy": lambda kernel: (64, half, half, 90),
        "in_batch_cross_entropy": lambda kernel: (64, half, 90),
        "jagged_attention": lambda kernel: (kernel, 32, half, 50),
    }[tuned.op]

    def configuration(kernel: str) -> dict:
        found = getattr(kernels, tuned.config)(*arguments(kernel))
        return found.get(kernel, found)

    for entry, kernel, candidates in tuned.candidates:
        before = configuration(kernel)
        for change in candidates:
            assert change.keys() <= before.keys()
            with changed(tuned.op, tuned.config, kernel, change):
                assert configuration(kernel) == before | change
        assert configuration(kernel) == before and entry.op == tuned.op


def fake(monkeypatch, path, **contents):
    """A module of that name, and its parents."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if name not in sys.modules or end == len(parts):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for key, value in contents.items():
        setattr(sys.modules[path], key, value)


def test_peers_that_are_absent_say_so():
    entry = Entry("linear_cross_entropy", dict(N=8, V=256, D=64), "bfloat16")
    for name, function in peers.linear_cross_entropy(entry).items():
        assert callable(function) or "not installed" in function, name


def test_liger(monkeypatch):
    calls = []

    class Function:
        @staticmethod
        def apply(*arguments):
            calls.append(arguments)
            return "loss", None, None, None

    path = "liger_kernel.ops.fused_linear_cross_entropy"
    fake(monkeypatch, path, LigerFusedLinearCrossEntropyFunction=Function)
    n, v, d = 4096, 1_000_000, 64
    table = peers._liger(Entry("linear_cross_entropy", dict(N=n, V=v, D=d), "bfloat16"))
    assert all(function("x", "w", "y") == "loss" for function in table.values())
    assert calls[0] == ("x", "w", "y")
    for arguments, rows, dtype in zip(
        calls[1:], (512, 1024, 512), (None, None, torch.float32), strict=True
    ):
        assert len(arguments) == 18 and arguments[11] == dtype
        # The rule of liger-kernel: rows of a chunk from its 18th argument.
        pieces = -(-v // (arguments[17] * d))
        assert 1 << (-(-n // pieces) - 1).bit_length() == rows


def test_cce_and_quack(monkeypatch):
    seen = []

    def cce(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False,
            filter_eps="high", impl="cce"):  # fmt: skip
        seen.append(filter_eps)

    def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean"):
        seen.append(chunk_size)

    fake(monkeypatch, "cut_cross_entropy", linear_cross_entropy=cce)
    fake(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=quack)

    def names(v, dtype="bfloat16"):
        entry = Entry("linear_cross_entropy", dict(N=4096, V=v, D=64), dtype)
        table = peers._cce(entry) | peers._quack(entry)
        seen.clear()
        for function in table.values():
            if callable(function):
                function("x", "w", "y")
        return table

    names(100_000)
    assert seen == ["high", None, 4096, 4096, 1024]
    table = names(1_000_000)
    assert seen == ["high", None, 2048, 1024] and "32-bit" in table["quack"]
    assert "32-bit" in names(40_000_000)["cce"]
    assert "bfloat16" in names(1000, "float32")["quack"]


def test_inf_cl(monkeypatch):
    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        assert labels is None and scale == 2.0 and head_dim == 64
        return torch.ones(3)

    fake(monkeypatch, "inf_cl", cal_flash_loss=cal_flash_loss)
    sizes = dict(B=128, D=64)
    found = peers.in_batch_cross_entropy(Entry("in_batch_cross_entropy", sizes, case="dot"))
    assert found["inf-cl"](torch.ones(1), torch.ones(1), None, None, None) == 1
    found = peers.in_batch_cross_entropy(Entry("in_batch_cross_entropy", sizes, case="dot groups"))
    assert "without exclusions" in found["inf-cl"]


@pytest.mark.parametrize("name", ["_flash_attention_forward", "_efficient_attention_forward"])
def test_attention_ops_take_these_arguments(name, monkeypatch):
    """The schema of the operator binds the arguments, without a device."""
    schema = getattr(torch.ops.aten, name).default._schema
    bound = []

    def operator(*arguments):
        required = [a for a in schema.arguments if not a.has_default_value()]
        assert len(required) <= len(arguments) <= len(schema.arguments)
        assert not schema.arguments[len(arguments) - 1].kwarg_only
        for argument, value in zip(schema.arguments, arguments, strict=False):
            kind = str(argument.type)
            if kind == "Tensor":
                assert isinstance(value, torch.Tensor), argument.name
            elif kind in ("int", "SymInt", "Optional[SymInt]", "Optional[int]"):
                assert type(value) is int, argument.name
            elif kind == "bool":
                assert type(value) is bool, argument.name
        bound.append(arguments)
        return (arguments[0],)

    monkeypatch.setattr(torch.ops, "aten", SimpleNamespace(**{name: operator}), raising=False)
    entry = Entry("jagged_attention", dict(B=2, N=3, H=2, D=8), "bfloat16", "full")
    packed, offsets = torch.ones(6, 3, 2, 8, dtype=torch.bfloat16), torch.tensor([0, 3, 6])
    which = "flash varlen" if "flash" in name else "efficient varlen"
    out = peers.jagged_attention(entry)[which](packed, offsets, None, 3)
    assert bound and out.shape == (6, 2, 8)
