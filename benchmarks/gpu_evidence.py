# SPDX-License-Identifier: Apache-2.0
"""Evidence from a GPU: correctness, speed against peers, memory, graphs, compilers.

    python benchmarks/gpu_evidence.py --plan first
    python benchmarks/gpu_evidence.py --sections probe,test --seconds 500
    python benchmarks/gpu_evidence.py --render

Needs a CUDA device, PyTorch and Triton, no network. It ends by itself in time; every measurement is
in `benchmarks/results/<device>.json` as soon as it is made, beside those of earlier runs. What a
plan runs is in benchmarks/gpu/plans.py, what a section shows in docs/gpu.md.
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

LOST = 75  # exit code of a process whose CUDA context is broken


def make_importable() -> None:
    """In a plain checkout nothing is `fastrec.kernels` yet: an installation maps kernels/ to it."""
    link = ROOT / "fastrec" / "kernels"
    if importlib.util.find_spec("fastrec.kernels") is None and not link.is_symlink():
        os.symlink("../kernels", link)
        importlib.invalidate_caches()


def functions() -> dict[str, Callable]:
    from benchmarks.gpu import checks, correct, ops, probe, programs, step, tune, uprec
    from benchmarks.gpu.cases import MEASURED

    table = {
        "probe": probe.probe,
        "attention_backward": programs.attention_backward,
        "budget": programs.budget,
        "masks": correct.masks,
        "test": programs.test,
        "step": step.step,
        "uprec_step": uprec.uprec_step,
        "memory": ops.memory,
        "graphs": checks.graphs,
        "compile": checks.compile,
        "sanitize": programs.sanitize,
        "sasrec": programs.sasrec,
    }
    table |= {name: ops.section_of(name) for name in MEASURED}
    return table | {name: tune.section_of(name) for name in tune.TUNED}


def run(state: dict, output: Path, device: str, tiny: bool) -> None:
    """The parts of `state` (see supervise.State), in this process."""
    import torch

    from benchmarks.gpu.context import Context, Results, environment
    from benchmarks.gpu.native import native
    from benchmarks.gpu.plans import section_of

    torch.manual_seed(0)
    context = Context(device, tiny, Results(output))
    context.crashed = {tuple(entry[:3]): entry[3] for entry in state["crashed"]}
    context.finished = {tuple(entry) for entry in state["finished"]}
    table, found = functions(), environment(device)
    for index, (part, share) in enumerate(state["parts"]):
        left = state["end"] - time.time()
        if left <= 0:
            print(f"{part}: out of time", flush=True)
            continue
        print(f"={part}", flush=True)
        share /= sum(other for _, other in state["parts"][index:])
        context.section, context.limit = section_of(part)
        # The ceilings always anew: it may be another machine with the same device.
        context.keep = state["keep"] and context.section != "probe"
        context.deadline = time.time() + left * share
        context.results.begin(context.section, found)
        begin = time.time()
        # The compiler does not look into the interpreter of Triton.
        backend = "cpp" if context.section == "compile" and device == "cpu" else "triton"
        with native(device, backend):
            table[context.section](context)
        context.results.write()
        print(f"{part}: {time.time() - begin:.0f} of {left * share:.0f} s", flush=True)


def child(arguments: argparse.Namespace, device: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `finally` blocks end programs
    from benchmarks.gpu.context import DeviceLost

    try:
        run(json.loads(arguments.child), arguments.output, device, arguments.tiny)
    except DeviceLost as error:
        print(f"the device is lost: {error}", flush=True)
        os._exit(LOST)  # the destructors of a broken context wait for it


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    make_importable()
    from benchmarks.gpu.plans import PLANS, SHARES, parts_of, section_of

    def chosen(text: str) -> list[str]:
        wanted = list(SHARES) if text == "all" else text.split(",")
        if unknown := [name for name in wanted if name not in SHARES]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SHARES)}")
        return wanted

    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", choices=PLANS, help="the most valuable first")
    what.add_argument("--sections", type=chosen, help=f"all, or of {', '.join(SHARES)}")
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything together")
    parser.add_argument("--output", type=Path, help="results file, merged with what it holds")
    parser.add_argument(
        "--tiny", action="store_true", help="CPU tensors and tiny shapes: that it runs, not times"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing, write the tables")
    parser.add_argument("--patience", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--table-root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
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
            sys.path.append(str(ROOT / "tests"))
            from interpreter import hasten

            hasten()
        child(arguments, device)
        return
    if arguments.plan is None and arguments.sections is None:
        parser.error("say --plan first, --plan second or --sections ...")
    parts = {name: SHARES[name] for name in arguments.sections or ()}
    if arguments.plan:
        parts = parts_of(arguments.plan, Results(arguments.output).data)
    patience = arguments.patience or max(60.0, min(150.0, 0.3 * arguments.seconds))
    started = supervise(
        parts,
        arguments.output.resolve(),
        arguments.seconds,
        ["--tiny"] * arguments.tiny,
        patience,
        keep=arguments.plan == "second",
    )
    if not started:
        raise SystemExit(1)
    stored = Results(arguments.output).data
    # The targets last: only the end of a long output may be kept.
    for section in [*dict.fromkeys(section_of(part)[0] for part in parts), "targets"]:
        print(f"\n== {section}\n{render.table(stored, section)}")
    print(f"\nwritten to {arguments.output.name}")


if __name__ == "__main__":
    main()
