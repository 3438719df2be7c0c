# SPDX-License-Identifier: Apache-2.0
"""How many threads the command line has, and how they wait for each other.

A step is some hundred parallel regions. At the end of each, the threads of OpenMP turn in a loop
until the last one arrives; on a machine that runs something else too, they keep the processor from
the very thread that they wait for (docs/log/neighbours.md). OpenMP reads its settings once, when
torch loads, and they are a matter of the whole process: so the command line sets them, and
importing fastrec does not.
"""

import math
import os
import sys
from pathlib import Path

SPINS = 3000  # some microseconds: a thread that is late by less is not worth a system call


def prepare_command(environment=os.environ, cgroups: Path = Path("/sys/fs/cgroup")) -> None:
    """Choose what the user has not chosen. Before torch is imported."""
    if "OMP_WAIT_POLICY" not in environment:
        environment["OMP_WAIT_POLICY"] = "passive"
        environment.setdefault("GOMP_SPINCOUNT", str(SPINS))
    quota = processors_of_quota(cgroups)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if quota is not None and quota < (allowed or 1):
        environment.setdefault("OMP_NUM_THREADS", str(quota))


def processors_of_quota(cgroups: Path) -> int | None:
    """Processors that a container may use at a time, rounded up; None without a limit. Version 2 of
    control groups has `cpu.max`, version 1 two files."""
    try:
        if (cgroups / "cpu.max").is_file():
            quota, period = (cgroups / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((cgroups / "cpu" / name).read_text().strip() for name in names)
        share = float(quota) / float(period)  # "max" is no number, and no limit is -1
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return math.ceil(share) if share > 0 else None


def is_command() -> bool:
    """Whether this process is `fastrec` or `python -m fastrec`."""
    if sys.argv[:1] == ["-m"]:  # while the package of `python -m` is imported
        place = sys.orig_argv.index("-m")
        return sys.orig_argv[place + 1 : place + 2] == ["fastrec"]
    return bool(sys.argv) and Path(sys.argv[0]).name in ("fastrec", "fastrec.exe")


def described() -> str:
    """A line for who reads a log."""
    import torch

    waits = os.environ.get("OMP_WAIT_POLICY", "OpenMP's default")
    return f"threads: {torch.get_num_threads()}, waiting: {waits} (OMP_WAIT_POLICY)"
