# SPDX-License-Identifier: Apache-2.0
"""Sections that run other programs: `attention_backward`, `test` (the generated op tests),
`sanitize`, `sasrec`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.checks import samples
from benchmarks.gpu.context import ROOT, Context
from benchmarks.gpu.correct import beyond_budget

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
    if context.have("tests/test_ops.py"):
        return
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
    from op_db import OPS
    from op_db.case import TYPES

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
                    wrong += beyond_budget(op, sample)
                    count += 1
                except RuntimeError as error:
                    wrong.append(f"{sample.name}: {context.rescue(error)['failed']}")
            context.save(key, {"samples": count} | ({"failed": "; ".join(wrong)} if wrong else {}))


def sanitizer() -> str | None:
    """The path of compute-sanitizer; None where it is not installed."""
    places = (shutil.which("compute-sanitizer"), *SANITIZERS)
    return next((path for path in places if path and os.access(path, os.X_OK)), None)


def _watched(context: Context, tool: str | None, *program: str) -> tuple[str, list[str]]:
    """(why it ended badly, lines) of a module of this package with its arguments, to which the
    device is added; under a tool of the sanitizer."""
    lines: list[str] = []

    def line(text: str) -> None:
        lines.append(text)
        context.alive()

    binary = sanitizer()
    watch = [binary, "--tool", tool, "--error-exitcode", "99"] if binary and tool else []
    command = [*watch, sys.executable, "-m", *program, context.device, *["tiny"] * context.tiny]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if watch else None
    return run_lines(command, context.seconds_left(), line, environment), lines


def budget(context: Context) -> None:
    """Forward and backward of the representative samples of every op, within its error budget."""
    if context.have("ended"):
        return
    context.announce("ended", "start")
    ended, lines = _watched(context, None, "benchmarks.gpu.correct", "budget")
    found = [text[4:].partition("\t") for text in lines if text.startswith("ran ")]
    results = {key: wrong for key, _, wrong in found}
    expected = [key for _, _, key in samples(context.device, context.tiny)]
    for key, wrong in results.items():
        context.save(key, {"failed": wrong[:300]} if wrong else {"passed": True})
    missing = [key for key in expected if key not in results]
    row: dict = {"ran": len(results), "of": len(expected)}
    if ended or missing:
        row["failed"] = f"{ended or 'ended'} before {', '.join(missing)}"[:300]
    elif any(results.values()):
        row["failed"] = "some are beyond it"  # so that the second plan runs all again
    context.save("ended", row)


def _summary(lines: list[str]) -> str:
    found = [text for text in lines if "ERROR SUMMARY" in text or "Error" in text]
    return found[-1][:200] if found else ""


def attention_backward(context: Context) -> None:
    """Gradients of attention at the shapes that assemblers get wrong on sm_90, against float64 on
    the host, watched by the memory checker where there is one."""
    if context.have("ended"):
        return
    context.announce("ended", "start")
    tool = "memcheck" if sanitizer() else None
    ended, lines = _watched(context, tool, "benchmarks.gpu.correct", "attention")
    for text in lines:
        if text.startswith("ran "):
            key, _, found = text[4:].partition("\t")
            row: dict = {"error_over_budget": float(found)}
            if not float(found) <= 1:
                row["failed"] = f"{found} times the budget"
            context.save(key, row)
    row = {"tool": tool or "none", "summary": _summary(lines)}
    if ended:
        row["failed"] = f"{ended} after {sum(text.startswith('ran ') for text in lines)} cases"
    elif not all(float(text.partition("\t")[2]) <= 1 for text in lines if text.startswith("ran ")):
        row["failed"] = "some are beyond it"  # so that the second plan runs all again
    context.save("ended", row)


def sanitize(context: Context) -> None:
    """compute-sanitizer on the representative samples of every op, one process a tool."""
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    for tool in tools[: context.limit]:
        if context.have(tool):
            continue
        if sanitizer() is None:
            context.save(tool, {"absent": "compute-sanitizer is not installed"})
            continue
        if context.over():
            continue
        context.announce(tool, "start")
        ended, lines = _watched(context, tool, "benchmarks.gpu.programs")
        ran = [text[4:] for text in lines if text.startswith("ran ")]
        row: dict = {"ran": ran, "summary": _summary(lines)}
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


# ml-1m.txt of SASRec ("user item" lines) goes there; it is not shipped.
ML_1M = ROOT / "data" / "ml-1m.txt"
GOAL = 0.182  # NDCG@10 of SASRec+ on the test split, seen items out (docs/results/ml-1m.md)


def sasrec(context: Context) -> None:
    """`sasrec` on ml-1m as docs/results/ml-1m.md trains it: minutes to the published accuracy."""
    missing = [name for name in ("lightning", "jsonargparse", "polars") if find_spec(name) is None]
    if context.tiny or missing or not ML_1M.exists():
        why = "CPU tensors" if context.tiny else f"{ML_1M.relative_to(ROOT)} is not there"
        why = f"not installed: {', '.join(missing)}" if missing else why
        return context.save("ml-1m", {"absent": why})
    if not context.have("ml-1m"):
        context.announce("ml-1m", "start")
        with tempfile.TemporaryDirectory() as folder:
            context.save("ml-1m", _sasrec(context, Path(folder)))


def _sasrec(context: Context, folder: Path) -> dict:
    cli, data, output = [sys.executable, "-m", "fastrec"], folder / "data", folder / "run"
    prepare = ["prepare", "--format", "pairs", "--source", ML_1M, "--output", data]
    train = ["pretrain", "--config", "sasrec", "--data", data, "--output", output]
    train += ["--model.max_len", 200, "--model.dropout", 0.1, "--pretraining.precision"]
    train += ["bf16-mixed", "--pretraining.steps", 3000, "--pretraining.batch_size", 128]
    judge = ["evaluate", "--data", data, "--pretrained", output / "model", "--output"]
    judge += [folder / "metrics.json"]
    row: dict = {"goal": GOAL}
    for name, arguments in (("prepare", prepare), ("train", train), ("evaluate", judge)):
        begin, lines = time.time(), []

        def line(text: str, begin=begin, lines=lines) -> None:
            lines.append(f"{time.time() - begin:.0f} s: {text}")
            context.alive()

        ended = run_lines([*cli, *map(str, arguments)], context.seconds_left(), line)
        row[f"{name}_seconds"] = time.time() - begin
        row[f"{name}_lines"] = [text[:200] for text in lines if "NDCG@10" in text][:40]
        if ended:
            return row | {"failed": f"{name}: {ended}; {lines[-1][:150] if lines else ''}"}
    found = json.loads((folder / "metrics.json").read_text())
    return row | {"metrics": found["metrics"]["model"]}


if __name__ == "__main__":
    from benchmarks.gpu.native import use_triton

    use_triton(sys.argv[1])
    _sanitized(sys.argv[1], "tiny" in sys.argv)
