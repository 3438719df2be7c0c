# SPDX-License-Identifier: Apache-2.0
"""Sections run in a process of their own: what happens when it breaks, hangs or does not start."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.importorskip("triton")
from benchmarks.gpu import supervise
from benchmarks.gpu.context import Results

PARTS = {"probe": 1, "attention": 2, "step": 1}
CHILD = """#!{python}
import json, sys, time
state = json.loads(sys.argv[sys.argv.index("--child") + 1])
say = lambda text: print(text, flush=True)
crashed = [entry[:3] for entry in state["crashed"]]
finished = state["finished"]
for section, share in state["parts"]:
    say(f"={{section}}")
    for key in ("first", "second"):
        if [section, key] in finished:
            continue
        for name in ("ours", "times") if key == "first" else ("lock", "ours"):
            say(f"@{{section}}\\t{{key}}\\t{{name}}")
            if [section, key, name] in crashed:
                continue
            if section == "attention" and name == "times":
                sys.exit(75)
            if section == "attention" and name == "lock":
                time.sleep(600)
        say(f"#{{section}}\\t{{key}}")
say("end")
"""


def test_a_broken_or_silent_process_is_replaced(tmp_path, monkeypatch, capsys):
    child = tmp_path / "child"
    child.write_text(CHILD.format(python=sys.executable))
    child.chmod(0o755)
    monkeypatch.setattr(supervise.sys, "executable", str(child))
    output = tmp_path / "results.json"
    stored = Results(output)
    stored.begin("attention", {})
    cut = {"implementations": {"fastrec": {"both": {}}, "eager": {"failed": "out of time"}}}
    stored.put("attention", "first", cut)
    assert supervise.supervise(PARTS, output, 60.0, [], patience=2.0)
    out = capsys.readouterr().out
    assert "attention first times: the process ended with 75" in out
    assert "attention second lock: no answer for 2 s" in out
    assert out.rstrip().endswith("end")
    row = Results(output).rows("attention")["first"]
    assert row == cut | {"failed": "the process ended with 75"}


def test_a_process_that_cannot_start_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(supervise.sys, "executable", "false")
    assert not supervise.supervise({"probe": 1}, tmp_path / "results.json", 60.0, [], patience=5.0)
    assert "nothing was measured: the process ended with 1" in capsys.readouterr().out
