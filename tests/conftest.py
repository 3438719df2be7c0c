# SPDX-License-Identifier: Apache-2.0
"""Seed, poisoned memory, thread count, and the count of operator cases that ran or were skipped."""

import contextlib
import hashlib
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest

# One thread, in the processes that tests start too: with a worker per core those of two processes
# wait for each other (benchmarks/epoch.py of test_benchmarks: 81 s of CPU, 8 with one thread).
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from interpreter import hasten

from fastrec.backend import interpreting, unavailable_reason

# The same examples in every run: what fails, fails for everybody. FASTREC_FUZZ draws others.
with contextlib.suppress(ModuleNotFoundError):  # a machine that only runs the ops lacks it
    from hypothesis import settings

    settings.register_profile("fixed", derandomize="FASTREC_FUZZ" not in os.environ)
    settings.load_profile("fixed")

# The compiler's cache knows operators by their names: it would run what it compiled for an op that
# has changed since.
_OPS = sorted((Path(__file__).parent.parent / "fastrec" / "ops").rglob("*.py"))
_STATE = hashlib.sha256(b"".join(file.read_bytes() for file in _OPS)).hexdigest()[:16]
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"fastrec-inductor-{_STATE}")
)

pytest_plugins = ["cli_runs", "backends"]

if interpreting():
    hasten()


@pytest.fixture(autouse=True)
def _isolation():
    """A fixed seed per test; one thread (tests of more threads ask for them: OpenMP workers of two
    processes that share the cores wait for each other); determinism as it was before the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned_memory():
    """Every `empty` and `new_empty`, also those of the C++ extension, returns NaN (or the largest
    integer), so that an element that a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def ranks():
    """ranks(world, work, *arguments): what `work(group, *arguments)` returns on each of `world`
    processes, which all tests share."""
    from groups import Ranks

    pools: dict[int, Ranks] = {}

    def run(world, work, *arguments):
        if world not in pools:
            pools[world] = Ranks(world)
        try:
            return pools[world].run(work, *arguments)
        except BaseException:
            pools.pop(world).close()
            raise

    yield run
    for pool in pools.values():
        pool.close()


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched on meta tensors, which are recorded instead of made."""
    pytest.importorskip("triton")
    from recorder import record_launches

    return record_launches(monkeypatch)


class OpCases:
    """Counts the tests that have a `backend` parameter and the marker `op_case`. With several
    processes (-n 2) the reports bring the backend to the one that counts."""

    def __init__(self):
        self.selected, self.ran, self.skipped = Counter(), Counter(), Counter()

    def pytest_collection_finish(self, session):
        for item in session.items:
            if item.get_closest_marker("op_case"):
                item.user_properties.append(("op_case_backend", item.callspec.params["backend"]))

    def pytest_runtest_logreport(self, report):
        backend = dict(report.user_properties).get("op_case_backend")
        if backend is None:
            return
        self.selected[backend] += report.when == "setup"
        if report.skipped:
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self.ran[backend] += 1

    def missing(self) -> list[str]:
        """Backends that can run here, were selected, and yet ran no case."""
        return [
            backend
            for backend in ("cpp", "triton")
            if unavailable_reason(backend, "linear_cross_entropy", torch.device("cpu")) is None
            and self.selected[backend]
            and not self.ran[backend]
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        collected_only = session.config.option.collectonly
        if collected_only or session.exitstatus not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            return
        if self.selected and (self.missing() or not self.ran.total()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.selected:
            return
        ran = ", ".join(f"{backend} {count}" for backend, count in sorted(self.ran.items()))
        line = f"op cases: ran {self.ran.total()} ({ran or 'none'})"
        if self.skipped:
            reasons = "; ".join(f"{why} ({count})" for why, count in self.skipped.most_common())
            line += f", skipped {self.skipped.total()}: {reasons}"
        terminalreporter.write_line(line)
        for backend in self.missing():
            terminalreporter.write_line(
                f"FAILED: {backend} can run here but no case ran it", red=True, bold=True
            )
        if not self.ran:
            terminalreporter.write_line("FAILED: op cases selected, none ran", red=True, bold=True)


def pytest_configure(config):
    config.addinivalue_line("markers", "op_case: a generated case of tests/test_ops.py")
    config.pluginmanager.register(OpCases(), "op_cases")
