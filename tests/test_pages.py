# SPDX-License-Identifier: Apache-2.0
"""Every fenced block of the pages runs, or is checked where it cannot run here.

| block | rule |
|---|---|
| python | those of a page run in their order in one namespace, shortened by SHORTER |
| python under a mark, `<!-- service -->` | another test runs it and looks at what comes out |
| sh: fastrec | the commands of a section run in one folder, trainings for TRAINED steps |
| sh: fastrec on pages of results, of several processes; torchrun | read, not run: flags, recipe |
| sh: python | the program exists and its parser takes the arguments |
| commands of benchmarks in the text | the same |
| sh: make, pip | the target, the extra exists |
| yaml | a recipe, over the one that `base:` or BASES names |
"""

import argparse
import fnmatch
import functools
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pages
import polars as pl
import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh

import fastrec
from fastrec import cli, recipes
from fastrec.data.loader import SequenceLoader
from fastrec.data.settings import from_values
from fastrec.data.side import SideData
from fastrec.data.steps.next_item import NextItem
from fastrec.data.views import Views
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective
from fastrec.training.config import Recipe
from fastrec.training.graphed import GraphedObjective

BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
PYTHON = sorted({b.page for b in BLOCKS if b.language == "python" and not b.mark})
SECTIONS = list(dict.fromkeys((b.page, b.section) for b in BLOCKS if b.language == "sh"))
YAML = [block for block in BLOCKS if block.language == "yaml"]
MARKED = [block for block in BLOCKS if block.mark]

# What python blocks of a page are shortened by.
SHORTER = {"steps=1000": "steps=3", "steps=100,": "steps=3,"}
# Pages whose commands are read, not run.
READ = ("docs/results/", "docs/processes.md")
TRAINED = {"steps": 2, "validate_every": 2, "checkpoint_every": 2, "batch_size": 40}
# The recipe that a block of YAML is put over, where it names none. By its section.
BASES = {
    "Items beyond their ids": "next-basket",
    "Sampled negatives": "sasrec",
    "Rows of a table instead of the table": "sasrec-sampled",
    "UPRec: attributes and friends": "uprec",
    "BERT4Rec": "bert4rec",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    pages.write_sources(folder)
    return folder


def test_every_block_has_a_rule():
    for block in BLOCKS:
        assert block.language in ("python", "sh", "yaml"), f"{block}: no rule for its language"
        assert block.language == "python" or not block.mark, f"{block}: marks are of python"
    assert {block.language for block in BLOCKS} == {"python", "sh", "yaml"}


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_a_marked_block_is_run_by_a_test_of_its_page(block):
    name = Path(block.page).name
    tests = [file.read_text() for file in Path(__file__).parent.rglob("test_*.py")]
    said = (f'"{block.mark}"', f"<!-- {block.mark} -->")
    assert any(f'"{name}"' in text and any(mark in text for mark in said) for text in tests)


def names_of(sources: Path) -> dict:
    """What the text around the python blocks of a page takes as given."""
    torch.manual_seed(0)
    dataset, model = pages.loaded(sources)
    N, V, D = 2, 30, 8
    batch = model.inputs(dataset, torch.arange(N), "test", ask=True)
    table = torch.randn(V, D, requires_grad=True)
    objective = JointObjective({"item": Item()}, model, None)
    views = Views({"main": [NextItem()]}, model.frame, SideData(dataset), 20)
    log = pl.read_csv(sources / "log.csv")
    frame = log.rename({"user_id": "customer", "timestamp": "bought_at"})
    return {
        "fastrec": fastrec, "torch": torch, "dataset": dataset, "model": model, "batch": batch,
        "states": torch.randn(N, D), "item_table": table, "targets": torch.arange(N),
        "bias": torch.zeros(V), "queries": torch.randn(N, D), "seen": torch.tensor([1, 2, 5]),
        "offsets": torch.tensor([0, 2, 3]), "seed": 1, "step": 0, "frame": frame,
        "users": torch.randn(N, D), "items": torch.randn(N, D), "objective": objective,
        "user_ids": torch.arange(N), "owner_ids": torch.arange(N), "table": table,
        "own_rows_of_the_table": table, "views": SequenceLoader(views, batch_size=40).batch_at(0),
        "group": dist.group.WORLD,
        "mesh": init_device_mesh("cpu", (1,)) if dist.is_initialized() else None,
    }  # fmt: skip


def without_graphs(losses, packs):
    return losses


@pytest.fixture
def one_process(page, tmp_path):
    """A group of this process alone, for the page that speaks of groups."""
    if page != "docs/processes.md":
        return (yield)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", PYTHON)
def test_python(page, sources, tmp_path, monkeypatch, one_process):
    monkeypatch.setattr(GraphedObjective.__init__, "__defaults__", (without_graphs,))
    names = {"__name__": "page", **names_of(sources)}
    for block in BLOCKS:
        if block.page != page or block.language != "python" or block.mark:
            continue
        folder = tmp_path / str(block.line)
        folder.mkdir()
        monkeypatch.chdir(folder)
        text = block.text
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        for name in re.findall(r'"([\w./-]+)"', text):
            pages.give(sources, name)
        exec(compile(text, str(block), "exec"), names)


@pytest.mark.parametrize(("page", "section"), SECTIONS, ids=str)
def test_commands(page, section, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rules = {
        "fastrec": fastrec_command, "python": program, "make": target, "pip": packages,
        "torchrun": launched,
    }  # fmt: skip
    ours = [b for b in BLOCKS if (b.page, b.section, b.language) == (page, section, "sh")]
    for block in ours:
        for name, *arguments in pages.commands(block, (*rules, "uvicorn")):
            absent = arguments[0] == "index" and importlib.util.find_spec("faiss") is None
            if name == "fastrec" and (absent or block.page.startswith(READ)):
                read(arguments, sources, monkeypatch)
            elif name == "fastrec":
                fastrec_command(arguments, sources, monkeypatch)
            else:
                rules[name](arguments, sources, monkeypatch)


def fastrec_command(arguments, sources, monkeypatch):
    command = arguments[0]
    for flag, value in pairwise(arguments):
        if flag != "--output":
            pages.give(sources, value)
    cli.main([*arguments, *shorter(command, arguments)])
    if "--output" in arguments:
        assert Path(arguments[arguments.index("--output") + 1]).exists()


def shorter(command: str, arguments: list[str]) -> list[str]:
    """Flags behind those of a page, which win over them."""
    if command == "generate":  # a minute at the size of the page
        return ["--users=2000", "--items=900"]
    if command == "index":  # 1,024 lists are for more than 150 items
        return ["--factory=IVF4,Flat"]
    task = [b for a, b in pairwise(arguments) if a == "--task"]
    found = ["--evaluation.friend_negatives=9"] * ("relation" in task)  # of 200 users
    if command not in ("pretrain", "finetune", "sweep"):
        return found
    settings, _ = cli._recipe_settings(arguments[1:])
    stages = ["pretraining"] if command != "finetune" else []
    if command != "pretrain":
        stages += task or ["recommendation" if "recommendation" in settings else "pretraining"]
    found += [f"--{stage}.{key}={value}" for stage in stages for key, value in TRAINED.items()]
    return found + ["--seeds=1"] * (command == "sweep")


def read(arguments, sources, monkeypatch):
    """The command reads its flags and its recipe and is not run."""
    ran = []
    for argument in arguments[1:]:
        if argument.endswith(".yaml"):
            pages.give(sources, argument)
    with monkeypatch.context() as patch:
        for table in (cli.COMMANDS, cli.RECIPE_COMMANDS):
            for name, function in table.items():
                stub = functools.wraps(function)(lambda *a, **k: ran.append((a, k)))
                patch.setitem(table, name, stub)
        cli.main(arguments)
    assert len(ran) == 1
    values, named = ran[0]
    if values and named.get("task"):
        values[0].stage(named["task"])


def launched(arguments, sources, monkeypatch):
    """`torchrun FLAGS -m fastrec COMMAND`; tests/test_processes.py runs such processes."""
    where = arguments.index("-m")
    assert arguments[where + 1] == "fastrec"
    read(arguments[where + 2 :], sources, monkeypatch)


class Parsed(Exception):
    pass


def program(arguments, sources, monkeypatch):
    """`python -m MODULE ...` and `python FILE ...`: up to the parsed arguments."""
    whole = argparse.ArgumentParser.parse_known_args

    def parse(self, args=None, namespace=None):
        _, rest = whole(self, args, namespace)
        assert not rest, rest
        raise Parsed

    monkeypatch.syspath_prepend(pages.ROOT)
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        if arguments[0] == "-m":
            patch.setattr(sys, "argv", [arguments[1], *arguments[2:]])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            patch.setattr(sys, "argv", arguments)
            runpy.run_path(str(pages.ROOT / arguments[0]), run_name="__main__")


PLACEHOLDERS = {"PACKAGE": "fastrec", "MODEL": "sasrec", "N": "9", "L": "9", "B": "9"}
INLINE = sorted({c for page in pages.PAGES for c in pages.inline(page, "python ")})


@pytest.mark.parametrize("command", INLINE)
def test_benchmarks_in_the_text(command, monkeypatch):
    """The commands beside numbers, `python -m benchmarks.NAME`, are read like those of blocks."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    program(words[1:], None, monkeypatch)


def target(arguments, sources, monkeypatch):
    (name,) = arguments
    assert re.search(rf"^{re.escape(name)}:.*##", (pages.ROOT / "Makefile").read_text(), re.M)


def packages(arguments, sources, monkeypatch):
    """The extras of fastrec exist. Other packages are whoever's, `fastrec` of PyPI among them."""
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    assert arguments[0] == "install"
    assert not any(re.match(r"fastrec\b", name) for name in arguments[1:])
    for extras in re.findall(r"(?:^\.|\.whl)\[(.*)\]", "\n".join(arguments[1:]), re.M):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml(block):
    settings = yaml.safe_load(block.text)
    base = settings.pop("base", None) or BASES[block.section]
    from_values(Recipe, recipes.merged(recipes.load(base), settings))


def test_links_lead_somewhere():
    """Files and headings, as GitHub names them. `make docs` looks at those of the site."""
    files = [*pages.ROOT.glob("*.md"), *pages.ROOT.glob("docs/**/*.md")]
    known = {file: pages.anchors(file) for file in files}
    wrong = []
    for file in files:
        for place, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", file.read_text()):
            aim = (file.parent / place).resolve() if place else file
            if not aim.exists() or (anchor and anchor not in known[aim]):
                wrong.append(f"{file.relative_to(pages.ROOT)}: {place}#{anchor}")
    assert wrong == []
    assert sum(map(len, known.values())) > 200


def test_the_files_that_pages_of_kernels_name_exist():
    """With their folders, or by a name that is somewhere."""
    folders = ("benchmarks", "csrc", "docs", "fastrec", "kernels", "tests")
    files = [f"/{file.relative_to(pages.ROOT).as_posix()}"
             for folder in folders for file in (pages.ROOT / folder).rglob("*.*")]  # fmt: skip
    wrong, right = [], 0
    for page in sorted((pages.ROOT / "docs/kernels").glob("*.md")):
        for name in re.findall(r"`([\w./*-]+\.(?:h|cpp|py|md|csv)|\S*\{\S*)`", page.read_text()):
            found = fnmatch.filter(files, f"*/{name}")
            right += bool(found)
            wrong += [] if found else [f"{page.name}: {name}"]
    assert wrong == [] and right > 80


def test_the_navigation_of_the_site_has_every_page_once():
    """`make docs` fails for one that it leaves out."""
    listed = re.findall(r"(?m)^ *- .*?([\w/-]+\.md)$", (pages.ROOT / "mkdocs.yml").read_text())
    hook = runpy.run_path(str(pages.ROOT / "docs/site/pages.py"))
    made = [name for name in hook["ABOVE"] if name.endswith(".md")]
    made += [f"api/{name}.md" for name in hook["API"]]
    docs = pages.ROOT / "docs"
    written = [page.relative_to(docs).as_posix() for page in docs.glob("**/*.md")]
    assert sorted(listed) == sorted(made + written)


def test_the_api_of_the_site_lists_every_public_name():
    names = runpy.run_path(str(pages.ROOT / "docs" / "site" / "pages.py"))
    listed = {
        name
        for _, parts in names["API"].values()
        for part in parts
        for name in names["listed"](part)
    }
    assert {f"fastrec.{name}" for name in fastrec.__all__} <= listed
    for name in listed:
        assert importlib.util.find_spec(name) if name.count(".") > 1 else getattr(fastrec, name[8:])


def test_nothing_stands_here_for_no_block():
    text = "\n".join(block.text for block in BLOCKS)
    assert all(long in text for long in SHORTER)
    assert set(BASES) == {b.section for b in YAML if "base" not in yaml.safe_load(b.text)}


@pytest.mark.parametrize("page", ["README.md", "docs/systems.md"])
def test_a_page_names_every_recipe(page):
    text = (pages.ROOT / page).read_text(encoding="utf-8")
    assert [name for name in recipes.names() if f"`{name}`" not in text] == []
