# SPDX-License-Identifier: Apache-2.0
"""Sections that run another program: `test` (the generated op tests) and `sanitize`."""

import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

from benchmarks.gpu.checks import samples
from benchmarks.gpu.context import ROOT, Context

SANITIZERS = (
    "/usr/local/cuda/bin/compute-sanitizer",
    "/usr/local/cuda/compute-sanitizer/compute-sanitizer",
)


def run_lines(command: list[str], seconds: float, line, environment: dict | None = None) -> str:
    """Calls `line` for every line of output; "" or why it ended badly. Ended after `seconds`, with
    the processes that it started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    late = []

    def stop(*_):
        late.append(True)
        os.killpg(process.pid, signal.SIGKILL)

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        for text in process.stdout or ():
            line(text.rstrip())
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return "out of time" if late else "" if code == 0 else f"exit code {code}"


def test(context: Context) -> None:
    """tests/test_ops.py on CUDA tensors (of tiny shapes on CPU tensors: one op, on triton)."""
    if find_spec("pytest") is None:
        return _without_pytest(context)
    tiny = "within_budget and bias_gelu and triton and bfloat16"
    wanted = "cuda and triton" if context.cuda else tiny
    command = [sys.executable, "-m", "pytest", "tests/test_ops.py", "-k", wanted, "-v", "-o"]
    command += ["addopts=", "-p", "no:cacheprovider", "--tb=line", "--no-header"]
    if context.cuda and find_spec("xdist"):
        # Most of the time is the compilation of kernels, on the host.
        command += ["-n", str(max(1, min(14, (os.cpu_count() or 2) - 2)))]
    counts = {"PASSED": 0, "FAILED": 0, "SKIPPED": 0, "ERROR": 0}
    by_op: dict[str, dict[str, int]] = {}
    failures: list[str] = []
    last = ""

    def line(text: str) -> None:
        nonlocal last
        last = text or last
        context.alive()
        found = re.search(r"(tests/test_ops\.py::\S+\[(\w+)-.*\])", text)
        verdict = re.search(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b", text)
        if found and verdict and " - " not in text:
            counts[verdict[1]] += 1
            op = by_op.setdefault(found[2], dict.fromkeys(counts, 0))
            op[verdict[1]] += 1
            if verdict[1] in ("FAILED", "ERROR"):
                failures.append(found[1])
            if sum(counts.values()) % 100 == 0:
                context.save("tests/test_ops.py", row("running"))

    def row(ended: str) -> dict:
        found = {"ended": ended, "counts": dict(counts), "by_op": by_op, "failures": failures[:200]}
        # "out of time" with cases that passed is a part of the evidence, not a failure.
        bad = counts["FAILED"] + counts["ERROR"] or ended.startswith("exit")
        if not bad and counts["PASSED"]:
            return found
        cases = counts["FAILED"] + counts["ERROR"]
        return found | {"failed": f"{cases} cases failed{', ' + ended if ended else ''}"}

    context.announce("tests/test_ops.py", "start")
    ended = run_lines(command, context.seconds_left(), line)
    context.save("tests/test_ops.py", row(ended) | {"last_line": last[:200]})


def _without_pytest(context: Context) -> None:
    """The budget of every sample, without the tests of memory and of state."""
    import torch
    from op_db import OPS
    from op_db.case import TYPES, excess, promote, run

    for op in OPS[: 1 if context.tiny else None]:
        for types in op.types[: 1 if context.tiny else None]:
            key = f"{op.name} {types.name}"
            if ("triton", types.name) in op.refuses or types not in TYPES or context.have(key):
                continue
            wrong, count = [], 0
            for sample in op.samples(context.device, types, context.tiny):
                if context.over():
                    break
                if context.announce(key, sample.name):
                    wrong.append(sample.name)
                    continue
                try:
                    exact = run(op.reference, promote(sample), op.differentiable)
                    low = run(op.reference, sample, op.differentiable)
                    actual = run(op.function, sample, op.differentiable)
                    band = op.rounding_band("triton", sample)
                    for name, value in actual.items():
                        error, budget = excess(
                            value, low[name], exact[name], sample.floor.get(name, 0)
                        )
                        if value.numel():
                            budget += band * exact[name].abs().max().item()
                        if not error <= budget:
                            wrong.append(f"{sample.name} {name} {error:.2g} > {budget:.2g}")
                    count += 1
                except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
                    wrong.append(f"{sample.name}: {context.rescue(error)['failed']}")
            context.save(key, {"samples": count} | ({"failed": "; ".join(wrong)} if wrong else {}))


def sanitize(context: Context) -> None:
    """compute-sanitizer on the representative samples of every op, one process a tool."""
    places = (shutil.which("compute-sanitizer"), *SANITIZERS)
    binary = next((path for path in places if path and os.access(path, os.X_OK)), None)
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        if context.have(tool):
            continue
        if binary is None:
            context.save(tool, {"absent": "compute-sanitizer is not installed"})
            continue
        if context.over():
            continue
        context.announce(tool, "start")
        lines: list[str] = []

        def line(text: str, lines=lines) -> None:
            lines.append(text)
            context.alive()

        command = [binary, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m"]
        command += ["benchmarks.gpu.programs", context.device, *(["tiny"] * context.tiny)]
        ended = run_lines(
            command,
            context.seconds_left(),
            line,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        ran = [text[4:] for text in lines if text.startswith("ran ")]
        summary = [text for text in lines if "ERROR SUMMARY" in text or "Error" in text]
        row: dict = {"ran": ran, "summary": summary[-1][:200] if summary else ""}
        if ended:
            row["failed"] = f"{ended} after {ran[-1] if ran else 'nothing'}"
        context.save(tool, row)


def _sanitized(device: str, tiny: bool) -> None:
    """The program that the sanitizer watches: small shapes, forward + backward of every op."""
    import torch
    from op_db.case import run

    for op, sample, key in samples(device, tiny=True):
        run(op.function, sample, op.differentiable)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"ran {key}", flush=True)


if __name__ == "__main__":
    from benchmarks.gpu.native import use_triton

    use_triton(sys.argv[1])
    _sanitized(sys.argv[1], "tiny" in sys.argv)
