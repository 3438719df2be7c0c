# SPDX-License-Identifier: Apache-2.0
"""Does a contrast help once the loss of items is a softmax over all of them? SASRec and, on the
same encoder, CL4SRec, DuoRec and CoSeRec, which add a contrast to it, and CCL, CLUE and AdaptSSR,
which pre-train it; all items ranked, on Beauty, LastFM, Yelp and ml-1m.

    python -m benchmarks.papers.contrastive --source data --output runs/contrast --cells beauty.

Cells are DATA.sasrec, and DATA.METHOD.steps and DATA.METHOD.time. In `steps` the next items are
trained for as many steps as SASRec's and pre-training comes on top, half as many; in `time` all of
a method takes the time of SASRec's steps, a third of it for pre-training. `differences` compares
them user by user.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.papers.cells import HERE, Cell, Run, run_table
from fastrec.cli import main


@dataclass(frozen=True)
class Data:
    """A file of events, the format that `fastrec prepare` has for it, and a recipe of SASRec."""

    file: str
    format: str
    steps: int
    batch_size: int
    max_len: int
    dropout: float


DATA = {
    "beauty": Data("Beauty.txt", "s3rec", 4000, 256, 50, 0.5),
    "lastfm": Data("LastFM.txt", "s3rec", 1500, 256, 50, 0.5),
    "yelp": Data("Yelp.txt", "s3rec", 4000, 256, 50, 0.5),
    "ml-1m": Data("ml-1m.txt", "pairs", 1500, 128, 200, 0.1),
}
# What a step of a training costs in steps of SASRec, on each of DATA: CPU time of 120 steps less
# that of 40 (ml-1m: 40 less 10) on one thread of an AMD EPYC (Zen 5).
COSTS = {
    "sasrec": (1.0, 1.0, 1.0, 1.0),
    "cl4srec": (1.40, 1.78, 1.20, 1.88),
    "duorec": (1.53, 2.00, 1.24, 2.24),
    "coserec": (1.47, 1.75, 1.31, 1.88),
    "filler": (0.73, 0.76, 0.74, 0.86),
    "ccl": (0.82, 1.29, 0.57, 1.37),
    "clue": (0.67, 1.07, 0.45, 1.15),
    "masked": (0.64, 0.69, 0.70, 0.80),
    "ranking": (0.89, 1.80, 0.70, 1.95),
}
# Recipe and flags: the presets of the papers, and two of them with cosines in place of products.
COSINE = "--pretraining.objectives.contrast.similarity=cosine"
JOINT = {
    "cl4srec": ("cl4srec",), "duorec": ("duorec",), "coserec": ("coserec",),
    "cl4srec-cosine": ("cl4srec", COSINE), "duorec-cosine": ("duorec", COSINE),
}  # fmt: skip
# Method -> its trainings before that of next items: (name, stage, recipe).
BEFORE = {
    "ccl": (("filler", "pretraining", "bert4rec"), ("ccl", "pretraining", "ccl")),
    "clue": (("clue", "pretraining", "clue"),),
    "adaptssr": (("masked", "pretraining", "adaptssr"), ("ranking", "ranking", "adaptssr")),
}
# What makes the encoder of a recipe that of SASRec.
SHAPE = {
    "clue": ("--model.encoder.transformer.heads=1",),
    "adaptssr": (
        "--model.head_transform=false",
        "--model.encoder={transformer: {layers: 2, heads: 1, pre_norm: true}}",
        "--recommendation.init.causal=true",
    ),
}
NEXT = HERE / "contrastive.yaml"
TRIES = 10  # validations of a training


def steps_of(name: str, training: str, share: float, kind: str) -> int:
    """Steps of a training that gets a share of SASRec's steps, or of the time of these."""
    cost = COSTS[training][list(DATA).index(name)] if kind == "time" else 1.0
    return TRIES * round(share * DATA[name].steps / cost / TRIES)


def flags(name: str, stage: str, steps: int, *configs: object) -> tuple[str, ...]:
    data = DATA[name]
    return (
        *(f"--config={each}" for each in configs), f"--data={{output}}/{name}",
        f"--model.max_len={data.max_len}", f"--model.dropout={data.dropout}",
        f"--{stage}.steps={steps}",
        f"--{stage}.batch_size={data.batch_size}", f"--{stage}.validate_every={steps // TRIES}",
    )  # fmt: skip


def curriculum(steps: int) -> str:
    """Of CCL: the share of filled items grows during the whole of its pre-training."""
    view = f"[fill: {{share: {{start: 0.1, end: 0.5, steps: {steps}}}}}]"
    return f"--pretraining.views={{main: null, a: {view}, b: {view}}}"


def joint(cell: str, name: str, kind: str, recipe: str, *extra: str) -> tuple[Run, ...]:
    steps = steps_of(name, recipe, 1.0, kind)
    own = (*flags(name, "pretraining", steps, recipe), *extra)
    return (Run(cell, "pretrain", "pretraining", own),)


def two_stages(cell: str, name: str, method: str, kind: str) -> tuple[Run, ...]:
    """Pre-training has half of SASRec's steps, or a third of its time; then come next items."""
    trainings, whole, rest = BEFORE[method], 1 / 2, 1.0
    if kind == "time":
        whole, rest = 1 / 3, 2 / 3
    runs: list[Run] = []
    for training, stage, recipe in trainings:
        steps = steps_of(name, training, whole / len(trainings), kind)
        configs = (recipe,) if recipe == "bert4rec" else (recipe, NEXT)
        own = (*flags(name, stage, steps, *configs), *SHAPE.get(method, ()))
        if training == "ccl":
            own += (f"--pretraining.filler={{runs}}/{runs[0].name}/model", curriculum(steps))
        starts = stage == "ranking"
        command, init = ("finetune", runs[-1].name) if starts else ("pretrain", None)
        runs.append(Run(f"{cell}.{training}", command, stage, own, init))
    steps = steps_of(name, "sasrec", rest, kind)
    last = (
        *flags(name, "recommendation", steps, method, NEXT),
        f"--recommendation.dropout={DATA[name].dropout}", *SHAPE.get(method, ()),
    )  # fmt: skip
    runs.append(Run(cell, "finetune", "recommendation", last, runs[-1].name))
    return tuple(runs)


def cells() -> dict[str, Cell]:
    made = {}
    for name in DATA:
        found = {f"{name}.sasrec": joint(f"{name}.sasrec", name, "steps", "sasrec")}
        for kind in ("time", "steps"):
            for method in JOINT:
                cell = f"{name}.{method}.{kind}"
                found[cell] = joint(cell, name, kind, *JOINT[method])
            for method in BEFORE:
                cell = f"{name}.{method}.{kind}"
                found[cell] = two_stages(cell, name, method, kind)
        for cell, runs in found.items():
            ranks = (f"--ranks={{runs}}/{cell}.parquet", "--overwrite=true")
            made[cell] = Cell(runs, (f"--data={{output}}/{name}", *ranks))
    return made


def prepare(source: Path, output: Path) -> None:
    """The data sets that are not there, of the files found in `source` and its folders."""
    for name, data in DATA.items():
        file = next(iter(sorted(source.rglob(data.file))), None)
        if file is not None and not (output / name / "schema.json").is_file():
            main(["prepare", f"--format={data.format}", f"--source={file}",
                  f"--output={output / name}", "--overwrite=true"])  # fmt: skip


if __name__ == "__main__":
    run_table(__doc__ or "", cells(), prepare)
