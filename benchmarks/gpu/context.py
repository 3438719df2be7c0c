# SPDX-License-Identifier: Apache-2.0
"""The results file, and what a section is given: a device, a deadline, and where to put rows."""

import gc
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("liger-kernel", "cut-cross-entropy", "inf-cl", "quack-kernels")
NO_TIME = {"failed": "out of time"}  # of an implementation that was not begun


Case = TypeVar("Case")


class DeviceLost(Exception):
    """The CUDA context of this process is broken: only a new process can go on."""


def device_name(device: str) -> str:
    """Name of the results file: "h200" for "NVIDIA H200", "h100" for "NVIDIA H100 80GB HBM3"."""
    if device == "cpu":
        return "cpu_tensors"
    words = torch.cuda.get_device_name().lower().replace("nvidia", "").split()
    return words[0] if words else "cuda"


def environment(device: str) -> dict:
    """What the rows of a section depend on. No host names, no paths."""
    import triton

    found = {
        "device": "CPU tensors, tiny shapes" if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "code": _code(),
    }
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _code() -> str:
    """A digest of the sources whose times are measured; the results file is no part of it."""
    digest = hashlib.sha256()
    patterns = (
        "kernels/**/*.py",
        "fastrec/random.py",
        "fastrec/tensors.py",
        "fastrec/[on]*/**/*.py",
    )
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:10]


class Results:
    """{"sections": {section: {"environment", "date", "rows": {key: row}, "earlier"}}}, written as
    it grows. "earlier": the same of other environments, to see a change against."""

    def __init__(self, path: Path):
        self.path, self.data = path, {"sections": {}}
        if path.exists():
            self.data = json.loads(path.read_text())

    def write(self) -> None:
        """In one step: a reader, or a run that is killed here, sees the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        other = self.path.with_suffix(".partial")
        other.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(other, self.path)

    def rows(self, section: str) -> dict:
        return self.data["sections"].get(section, {}).get("rows", {})

    def begin(self, section: str, environment: dict) -> None:
        """Rows of an earlier run stay if they are of the same environment; others go aside."""
        old = self.data["sections"].get(section, {"rows": {}})
        earlier = old.pop("earlier", [])
        same = old.get("environment") == environment
        if old["rows"] and not same:
            earlier.append(old)
        self.data["sections"][section] = {
            "environment": environment,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "rows": old["rows"] if same else {},
            "earlier": earlier,
        }
        self.write()  # the supervisor looks there for a section that ends its process at once

    def put(self, section: str, key: str, row: dict) -> None:
        self.data["sections"][section]["rows"][key] = row
        self.write()


def _good(row: dict) -> bool:
    """Whether a row is what it should be: of several implementations, that of fastrec."""
    ours = row.get("implementations", {"fastrec": {}}).get("fastrec", {"failed": "not measured"})
    return "failed" not in row and "failed" not in ours and not row.get("ended")


def _cut(row: dict) -> int:
    """How many implementations of a row there was no time for."""
    return list(row.get("implementations", {}).values()).count(NO_TIME)


@dataclass
class Context:
    """What a section gets.

    crashed: (section, key, name) of measurements that ended an earlier process of this run.
    finished: (section, key) of rows that this run already has.
    keep: whether good rows of an earlier run in the same environment are not made again.
    limit: how many of its first cases the section runs; None for all.
    """

    device: str
    tiny: bool
    results: Results
    section: str = ""
    deadline: float = float("inf")
    crashed: dict[tuple[str, str, str], str] = field(default_factory=dict)
    finished: set[tuple[str, str]] = field(default_factory=set)
    keep: bool = False
    limit: int | None = None

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def over(self) -> bool:
        """Whether the share of the section is used up: start nothing more."""
        return time.time() >= self.deadline

    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def announce(self, key: str, name: str) -> str | None:
        """Say what comes next, so that the supervisor knows what ended this process. Returns why
        it must not be tried again, if so."""
        print(f"@{self.section}\t{key}\t{name}", flush=True)
        return self.crashed.get((self.section, key, name))

    def alive(self) -> None:
        """Tell the supervisor that something goes on."""
        print("@", flush=True)

    def have(self, key: str) -> bool:
        if (self.section, key) in self.finished:
            return True
        row = self.results.rows(self.section).get(key)
        return self.keep and row is not None and _good(row) and not _cut(row)

    def new_first(self, cases: Iterable[Case], key_of: Callable[[Case], str]) -> list[Case]:
        """The first cases of the section; those of which there is a part come last."""
        rows = self.results.rows(self.section)
        return sorted(islice(cases, self.limit), key=lambda case: key_of(case) in rows)

    def save(self, key: str, row: dict) -> None:
        """A row without some implementations is not finished: a later part of the plan makes it
        again, and it is kept if there is even less time then."""
        before = self.results.rows(self.section).get(key)
        if before is None or not _good(before) or _cut(row) <= _cut(before):
            self.results.put(self.section, key, row)
        if not _cut(row):
            self.finished.add((self.section, key))
            print(f"#{self.section}\t{key}", flush=True)

    def release(self) -> None:
        """Give back memory of a failed call; not inside `except`, which holds its frames."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def rescue(self, error: BaseException) -> dict:
        """The row of something that failed. Raises DeviceLost if nothing can run after it."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else lines[0]
        if self.cuda:
            try:
                torch.cuda.synchronize()
            except Exception as lost:
                raise DeviceLost(why) from lost
        return {"failed": f"{type(error).__name__}: {why}"[:300]}

    def attempt(self, key: str, measure: Callable[[], dict], name: str | None = "") -> None:
        """Save what `measure` returns, or why it failed; nothing where the row is there or the time
        is used up. `name`: what is announced; None where `measure` announces its parts."""
        if self.over() or self.have(key):
            return
        if name is not None and (why := self.announce(key, name)):
            self.save(key, {"failed": why})
            return
        try:
            row = measure()
        except Exception as error:
            row = self.rescue(error)
        self.save(key, row)
        self.release()

    def ceilings(self) -> dict[str, float]:
        """Measured rates by name, without unit prefixes; empty where probe has not run."""
        rows = self.results.rows("probe")
        return {name: row["rate"] for name, row in rows.items() if "rate" in row}
