# SPDX-License-Identifier: Apache-2.0
"""What importing fastrec and asking for help cost: no heavy module. And the saved texts of --help,
which are what the parsers say: `python tests/test_help.py` writes them."""

import contextlib
import io
import os
import re
import subprocess
import sys

import pytest

import fastrec.__main__
from fastrec.__main__ import HELP, saved_help
from fastrec.cli import COMMANDS, RECIPE_COMMANDS, main

ASKED = [[], *([name] for name in (*RECIPE_COMMANDS, *COMMANDS))]
HEAVY = (
    "lightning", "polars", "pyarrow", "jsonargparse", "matplotlib", "rich", "tensorboard", "yaml",
    "pandas", "safetensors", "tokenizers", "transformers", "onnx", "torch._dynamo",
    "torch._inductor", "triton",
)  # fmt: skip


def printed(arguments: list[str]) -> str:
    """What the parsers say, on 100 columns."""
    out, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*arguments, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return out.getvalue()


@pytest.mark.parametrize("arguments", ASKED, ids=str)
def test_saved_help_is_what_the_parser_says(arguments):
    saved, said = saved_help([*arguments, "--help"]), printed(arguments)
    flag = re.compile(r"--[\w.]+")
    assert set(flag.findall(saved)) == set(flag.findall(said))
    if sys.version_info[:2] == (3, 11):  # others lay it out otherwise
        assert saved.split() == said.split(), "python tests/test_help.py"


def test_only_help_alone_is_answered_from_a_file():
    assert {file.stem for file in HELP.glob("*.txt")} == {"".join(a) or "fastrec" for a in ASKED}
    for other in ("", "pretrain", "pretrain --help-all", "nothing --help", "--help x", "-h -h",
                  "pretrain --config x --help"):  # fmt: skip
        assert saved_help(other.split()) is None


def modules_of(program: str) -> set[str]:
    """What a process has imported at its end."""
    program = f"import sys\n{program}\nprint('\\n' + ' '.join(sys.modules))"
    got = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    return set(got.stdout.splitlines()[-1].split())


def test_import_fastrec_imports_nothing_heavy_beyond_torch():
    """It took 0.11 s of CPU time behind torch's 1.5."""
    beyond = modules_of("import fastrec") - modules_of("import torch")
    assert "fastrec.ops.linear" in beyond
    assert {name for name in beyond if name.startswith(HEAVY)} == set()
    assert not any(name.startswith(("fastrec.data", "fastrec.nn")) for name in beyond)


@pytest.mark.parametrize("module", ["fastrec.cli", "fastrec.serve", "fastrec.evaluation.next_item"])
def test_only_preparing_loads_what_prepares(module):
    found = modules_of(f"import {module}")
    assert module in found
    assert not any(name.startswith("fastrec.data.prepare") for name in found)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pretrain", "--help"], ["prepare", "-h"], ["--version"]], ids=str
)
def test_help_and_version_do_without_torch(arguments):
    program = f"sys.argv = ['fastrec', *{arguments}]\nfrom fastrec.__main__ import main; main()"
    found = modules_of(program)
    assert "fastrec.__main__" in found
    assert not {"torch", "numpy", *HEAVY} & found


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastrec", "--version"])
    fastrec.__main__.main()
    assert capsys.readouterr().out == f"fastrec {fastrec.__version__}\n"


def test_a_command_still_has_the_ops():
    program = (
        "sys.argv = ['fastrec']; import fastrec; fastrec.linear_rank; from fastrec import linear"
    )
    assert "fastrec.ops.linear_rank" in modules_of(program)


if __name__ == "__main__":
    HELP.mkdir(exist_ok=True)
    for arguments in ASKED:
        (HELP / f"{''.join(arguments) or 'fastrec'}.txt").write_text(printed(arguments))
