# SPDX-License-Identifier: Apache-2.0
"""Evidence from a GPU: correctness, speed against peers, memory, graphs, compilers.

    python benchmarks/gpu_evidence.py --sections probe,test --minutes 8.5
    python benchmarks/gpu_evidence.py --render

Needs a CUDA device, PyTorch and Triton, no network. Sections stop by themselves in time; every
measurement is in `benchmarks/results/<device>.json` as soon as it is made, beside those of earlier
runs. docs/gpu.md says what each section shows.
"""

import argparse
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] != str(ROOT):  # run as a file: its folder is no place for imports
    sys.path[0] = str(ROOT)

# Section -> its share of the time that is left when it begins.
SHARES = {
    "probe": 1,
    "test": 8,
    "linear_ce": 8,
    "in_batch": 4,
    "attention": 4,
    "encoder": 2,
    "rank_topk": 3,
    "sampled": 2,
    "step": 6,
    "uprec_step": 5,
    "memory": 2,
    "graphs": 2,
    "compile": 3,
    "sanitize": 3,
    "tune_linear_ce": 3,
    "tune_in_batch": 1,
    "tune_attention": 2,
}
LOST = 75  # exit code of a process whose CUDA context is broken


def make_importable() -> None:
    """In a plain checkout nothing is `fastrec.kernels` yet: an installation maps kernels/ to it."""
    link = ROOT / "fastrec" / "kernels"
    if importlib.util.find_spec("fastrec.kernels") is None and not link.is_symlink():
        os.symlink("../kernels", link)
        importlib.invalidate_caches()


def functions() -> dict[str, Callable]:
    from benchmarks.gpu import checks, ops, probe, programs, step, tune, uprec
    from benchmarks.gpu.cases import MEASURED

    table = {
        "probe": probe.probe,
        "test": programs.test,
        "step": step.step,
        "uprec_step": uprec.uprec_step,
        "memory": ops.memory,
        "graphs": checks.graphs,
        "compile": checks.compile,
        "sanitize": programs.sanitize,
    }
    table |= {name: ops.section_of(name) for name in MEASURED}
    return table | {name: tune.section_of(name) for name in tune.TUNED}


def run(state: dict, output: Path, device: str, tiny: bool) -> None:
    """The sections of `state` (see supervise.State), in this process."""
    import torch

    from benchmarks.gpu.context import Context, Results, environment
    from benchmarks.gpu.native import native

    torch.manual_seed(0)
    context = Context(device, tiny, Results(output))
    context.crashed = {tuple(entry[:3]): entry[3] for entry in state["crashed"]}
    context.finished = {tuple(entry) for entry in state["finished"]}
    table, found = functions(), environment(device)
    for index, section in enumerate(state["sections"]):
        left = state["end"] - time.time()
        if left <= 0:
            print(f"{section}: out of time", flush=True)
            continue
        share = SHARES[section] / sum(SHARES[name] for name in state["sections"][index:])
        context.section, context.deadline = section, time.time() + left * share
        context.results.begin(section, found)
        begin = time.time()
        # The compiler does not look into the interpreter of Triton.
        backend = "cpp" if section == "compile" and device == "cpu" else "triton"
        with native(device, backend):
            table[section](context)
        context.results.write()
        print(f"{section}: {time.time() - begin:.0f} of {left * share:.0f} s", flush=True)


def child(arguments: argparse.Namespace, device: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `finally` blocks end programs
    from benchmarks.gpu.context import DeviceLost

    try:
        run(json.loads(arguments.child), arguments.output, device, arguments.tiny)
    except DeviceLost as error:
        print(f"the device is lost: {error}", flush=True)
        os._exit(LOST)  # the destructors of a broken context wait for it


def _sections(text: str) -> list[str]:
    wanted = list(SHARES) if text == "all" else text.split(",")
    if unknown := [name for name in wanted if name not in SHARES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SHARES)}")
    return wanted


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ",".join(name for name in SHARES if not name.startswith("tune"))
    parser.add_argument(
        "--sections", type=_sections, default=_sections(every), help=f"of {', '.join(SHARES)}"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="for all sections together")
    parser.add_argument("--output", type=Path, help="results file, merged with what it holds")
    parser.add_argument(
        "--tiny", action="store_true", help="CPU tensors and tiny shapes: that it runs, not times"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing, write the tables")
    parser.add_argument("--patience", type=float, default=150.0, help=argparse.SUPPRESS)
    parser.add_argument("--table-root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    make_importable()
    from benchmarks.gpu import render
    from benchmarks.gpu.context import Results, device_name
    from benchmarks.gpu.supervise import supervise

    results = ROOT / "benchmarks" / "results"
    if arguments.render:
        render.update(arguments.table_root, arguments.output or render.newest(results))
        return
    device = "cpu" if arguments.tiny else "cuda"
    if arguments.tiny and arguments.output is None:
        raise SystemExit("--tiny needs --output: its numbers are no results")
    if not arguments.tiny:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device is available; --tiny runs everything on CPU tensors")
        arguments.output = arguments.output or results / f"{device_name(device)}.json"
    if arguments.child:
        if arguments.tiny:
            os.environ["TRITON_INTERPRET"] = "1"
        child(arguments, device)
        return
    more = ["--tiny"] * arguments.tiny
    started = supervise(
        arguments.sections, arguments.output.resolve(), arguments.minutes, more, arguments.patience
    )
    if not started:
        raise SystemExit(1)
    stored = Results(arguments.output).data
    for section in arguments.sections:
        print(f"\n== {section}\n{render.table(stored, section)}")
    print(f"\nwritten to {arguments.output.name}")


if __name__ == "__main__":
    main()
