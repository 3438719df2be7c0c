# SPDX-License-Identifier: Apache-2.0
"""Runs the parts of a plan in a process of their own and starts another one when it ends badly.

A kernel that reads out of bounds breaks the CUDA context, a lock that is never released stops
everything: the measurement that did it becomes a row that says so, and the next ones go on.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.context import ROOT, Results

PATIENCE = 150.0  # seconds without a word: compilers are slow, but not that slow
GRACE = 20.0  # seconds beyond the end for what was under way
RESTARTS = 12
# What is announced without a name that could be left out: the whole row is given up.
WHOLE = {"", "start", "errors", "times", "kernels"}


@dataclass
class State:
    """What a new process has to know of those before it."""

    parts: list  # [part, share], of which the first one is under way
    end: float
    keep: bool = False  # rows of earlier runs that are good
    crashed: list = field(default_factory=list)  # [section, key, name, why]
    finished: list = field(default_factory=list)  # [section, key]


@dataclass
class Watch:
    """The process that runs sections, and what it said last."""

    process: subprocess.Popen
    pending: tuple[str, str, str] | None = None

    def hear(self, line: str, state: State) -> None:
        if line.startswith("@") and line.count("\t") == 2:
            section, key, name = line[1:].split("\t")
            self.pending = section, key, name
        elif line.startswith("#") and line.count("\t") == 1:
            state.finished.append(line[1:].split("\t"))
        elif line.startswith("="):
            names = [part for part, _ in state.parts]
            state.parts = state.parts[names.index(line[1:]) :]
        elif line != "@":
            print(line, flush=True)

    def end(self) -> None:
        """First so that it can end programs of its own, then by force."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                try:
                    self.process.wait(5)
                except subprocess.TimeoutExpired:
                    continue


def _lines(watch: Watch, state: State, patience: float) -> str:
    """Follows the process until it ends; "" or why it was ended."""
    assert watch.process.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(watch.process.stdout, selectors.EVENT_READ)
        heard, rest = time.time(), b""
        while True:
            if time.time() > state.end + GRACE:
                return "out of time"
            if time.time() - heard > patience:
                return f"no answer for {patience:.0f} s"
            if not ready.select(timeout=1.0):
                continue
            chunk = os.read(watch.process.stdout.fileno(), 65536)
            if not chunk:
                return ""
            heard, rest = time.time(), rest + chunk
            *complete, rest = rest.split(b"\n")
            for line in complete:
                watch.hear(line.decode(errors="replace"), state)


def supervise(
    parts: dict[str, float],
    output: Path,
    seconds: float,
    arguments: list[str],
    patience: float,
    keep: bool = False,
) -> bool:
    """Runs `parts` for at most `seconds`; False where the process could not even start."""
    state = State([list(item) for item in parts.items()], time.time() + seconds, keep)
    for _ in range(RESTARTS):
        if time.time() > state.end:
            break
        command = [sys.executable, "-m", "benchmarks.gpu_evidence", "--output", str(output)]
        command += [*arguments, "--child", json.dumps(vars(state))]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        watch = Watch(process)
        try:
            why = _lines(watch, state, patience)
            if not why and (code := process.wait()):
                why = f"the process ended with {code}"
        finally:
            watch.end()
        if not why:
            return True
        if watch.pending is None:
            print(f"nothing was measured: {why}", flush=True)
            return False
        print(f"{' '.join(watch.pending)}: {why}", flush=True)
        if why == "out of time":
            return True
        _give_up(state, watch.pending, why, output)
    return True


def _give_up(state: State, pending: tuple[str, str, str], why: str, output: Path) -> None:
    section, key, name = pending
    if name in WHOLE:
        found = Results(output)  # of a row that was cut and is made again, what it had stays
        found.put(section, key, found.rows(section).get(key, {}) | {"failed": why})
        state.finished.append([section, key])
    else:
        state.crashed.append([section, key, name, why])
