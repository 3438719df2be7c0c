# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/gpu_evidence.py` without a GPU: both plans on CPU tensors and tiny shapes, their
order and the tables that are made of them. No test asserts a time."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from gpu_context import context

from benchmarks import gpu_evidence
from benchmarks.gpu import cases, ops, plans, render, targets

ROOT = Path(__file__).resolve().parent.parent
FAKE_SANITIZER = """#!/bin/sh
# compute-sanitizer --tool NAME --error-exitcode 99 PROGRAM ...
tool=$2; shift 4
case $tool in
  memcheck) "$@" && echo "========= ERROR SUMMARY: 0 errors";;
  racecheck) echo "========= ERROR SUMMARY: 3 errors"; exit 99;;
esac
"""


def evidence(*arguments, path=""):
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_evidence.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{path}:{os.environ['PATH']}"},
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """(output, results) of both plans, as on a machine that is had twice."""
    folder = tmp_path_factory.mktemp("gpu")
    sanitizer = folder / "compute-sanitizer"
    sanitizer.write_text(FAKE_SANITIZER)
    sanitizer.chmod(sanitizer.stat().st_mode | stat.S_IXUSR)
    output, printed = folder / "tiny.json", []
    for plan in plans.PLANS:
        # Time enough that a loaded machine leaves nothing out.
        process = evidence(
            "--tiny", "--plan", plan, "--seconds", 3600, "--output", output, path=folder
        )
        assert process.returncode == 0, process.stdout + process.stderr
        printed.append(process.stdout)
    return printed, json.loads(output.read_text())


def failures(found):
    """Every text under the key "failed", wherever it is."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from [value] if key == "failed" else failures(value)


@pytest.mark.slow
def test_both_plans_run(everything):
    printed, results = everything
    sections = results["sections"]
    assert sections.keys() == plans.SHARES.keys()
    for plan, out in zip(plans.PLANS, printed, strict=True):
        parts = plans.parts_of(plan, {})
        assert [x for x in re.findall(r"^(\S+): \d+ of \d+ s$", out, re.M)] == list(parts)
        tables = re.findall(r"^== (\w+)$", out, re.M)
        assert tables == [*dict.fromkeys(part.partition("@")[0] for part in parts), "targets"]
        assert re.search(r"\| masks of the CPU \| the same bits \| 4 of 4 pass \|", out)
    for name, section in sections.items():
        assert section["rows"], name
        wrong = [why for why in failures(section["rows"]) if "99" not in why]
        assert not wrong, f"{name}: {wrong}"
    assert not re.search(r"(?<!\w)/(tmp|root|work|home)", json.dumps(results)), "machine paths"
    for name, measured in cases.MEASURED.items():
        for row in sections[name]["rows"].values():
            table = row["implementations"]
            ours = table["fastrec"]
            main = ours["forward" if name == "rank_topk" else "both"]
            assert ours["ratio"] == 1 and main["floor_share"] > 0
            assert main["p10"] <= main["p20"] <= main["median"] <= main["p80"]
            assert ours["output_error"] < 0.05 and ours["gradient_error"] < 0.05
            known = {peer for _, names in measured.columns for peer in names}
            assert known & table.keys()
    step = sections["step"]["rows"]["tiny"]
    assert set(step["implementations"]) == {
        "padded eager", "padded torch.compile", "reference", "fastrec", "fastrec in a CUDA graph",
    }  # fmt: skip
    assert step["implementations"]["fastrec"]["kernels"]["largest"]
    uprec = sections["uprec_step"]["rows"]["UPRec, tiny"]
    assert uprec["difference"] < 1e-3 and len(uprec["implementations"]) == 4
    assert any(row["seeded"] for row in sections["graphs"]["rows"].values())
    assert sections["test"]["rows"]["tests/test_ops.py"]["counts"]["PASSED"] > 0
    checked = sections["sanitize"]["rows"]
    assert len(checked["memcheck"]["ran"]) == len(sections["graphs"]["rows"])
    assert "0 errors" in checked["memcheck"]["summary"] and "failed" not in checked["memcheck"]
    assert checked["racecheck"]["failed"] == "exit code 99 after nothing"


@pytest.mark.slow
def test_a_later_run_merges(tmp_path):
    context(tmp_path).save("a shape", {"implementations": {"fastrec": {"failed": "out of time"}}})
    output = tmp_path / "results.json"
    before = json.loads(output.read_text())["sections"]["encoder"]
    taken = []
    for _ in range(2):
        process = evidence("--tiny", "--sections", "probe", "--output", output)
        assert process.returncode == 0, process.stderr
        sections = json.loads(output.read_text())["sections"]
        assert set(sections) == {"encoder", "probe"} and sections["encoder"] == before
        taken.append(sections["probe"]["rows"]["copy"]["rate"])
    assert taken[0] != taken[1], "the second run measured nothing"


def test_tables_replace_the_marked_blocks(tmp_path):
    found = context(tmp_path)
    times = {"median": 0.002, "p10": 0.001, "ps_per_element": 7.0}
    row = dict(output_error=1e-3, gradient_error=2e-3, peak_bytes=2**20, ratio=1.0)
    ours = row | {"forward": times, "both": times | {"floor_share": 0.25}}
    eager = row | {"both": times, "forward": times, "ratio": 3.0}
    found.save("a shape", {"implementations": {"fastrec": ours, "eager": eager}})
    (tmp_path / "docs").mkdir()
    document = tmp_path / "docs" / "gpu.md"
    blocks = [f"<!-- gpu:{name} -->\nreplace me\n<!-- /gpu -->" for name in ("encoder", "step")]
    document.write_text("# Title\n\n" + "\n\n".join(blocks) + "\n\nend\n")
    for _ in range(2):  # the second time replaces the same blocks
        render.update(tmp_path, tmp_path / "results.json")
        text = document.read_text()
        assert text.startswith("# Title\n") and text.endswith("\nend\n")
        assert "replace me" not in text and text.count("<!-- /gpu -->") == 2
    assert "| a shape | 2 (1) | 2 (1) | 7 | -, 25 % | 3.00x | - | 1 |" in text
    assert "No GPU has been measured in section `step` yet." in text
    every = render.table(found.results.data, "all")
    assert every.startswith("### `encoder`\n\n| shape |") and "step" not in every
    assert render.table({}, "all") == "No GPU has been measured yet."


def test_documents_say_what_is_missing(tmp_path, capsys):
    (tmp_path / "README.md").write_text("<!-- gpu:linear_ce -->\n<!-- /gpu -->\n")
    assert render.update(tmp_path, render.newest(tmp_path)) == ["README.md"]
    assert "No GPU has been measured in section `linear_ce`" in (tmp_path / "README.md").read_text()
    assert "no GPU has been measured" in capsys.readouterr().out


def test_every_section_has_a_share_and_a_function():
    assert gpu_evidence.functions().keys() == plans.SHARES.keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sections", "probe,nothing", "--tiny"], "'nothing' is none of probe"),
        (["--tiny"], "--tiny needs --output"),
        ([], "no CUDA device"),
        (["--tiny", "--output", "x.json"], "say --plan first, --plan second or --sections"),
        (["--plan", "first", "--sections", "probe"], "not allowed with argument"),
    ],
)
def test_arguments_that_cannot_run(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        gpu_evidence.main(arguments)
    assert message in str(error.value) + capsys.readouterr().err


def test_a_checkout_becomes_importable(tmp_path, monkeypatch):
    (tmp_path / "fastrec").mkdir()
    monkeypatch.setattr(gpu_evidence, "ROOT", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for _ in range(2):
        gpu_evidence.make_importable()
        assert os.readlink(tmp_path / "fastrec" / "kernels") == "../kernels"


@pytest.mark.parametrize("plan", plans.PLANS)
def test_plans_are_of_sections_and_hold_every_target(plan):
    parts = plans.parts_of(plan, {})
    named = [plans.section_of(part) for part in parts]
    assert {section for section, _ in named} <= plans.SHARES.keys()
    assert named[:2] == [("probe", None), ("attention_backward", None)]
    for target in targets.TARGETS:
        limits = [number for section, number in named if section == target.section]
        # The first call is too short for these.
        assert limits or (plan == "first" and target.section in ("step", "sasrec")), target.case
        if target.section in cases.MEASURED:
            order = [entry.key for entry in cases.MEASURED[target.section].entries]
            most = len(order) if None in limits else max(limits)
            assert all(order.index(key) < most for key in target.keys), target.case


def test_tiles_are_tried_of_what_is_furthest_from_its_floor():
    def stored(**shares):
        sections = {}
        for name, share in shares.items():
            ours = {"both": {"floor_share": share}}
            key = cases.MEASURED[name].entries[0].key
            sections[name] = {"rows": {key: {"implementations": {"fastrec": ours}}}}
        return {"sections": sections}

    def order(**shares):
        parts = plans.parts_of("second", stored(**shares))
        return [part for part in parts if part.startswith("tune")]

    assert order(linear_ce=0.5, attention=0.2, in_batch=0.3)[0] == "tune_attention"
    assert order(linear_ce=0.5, attention=0.2)[0] == "tune_in_batch", "it has no time at all"


def test_the_second_plan_measures_what_is_missing_or_was_wrong(tmp_path):
    good = {"implementations": {"fastrec": {"both": {}}, "cce": {"failed": "not installed"}}}
    rows = {
        "good": good,
        "wrong": {"implementations": {"fastrec": {"failed": "error 1: no times"}}},
        "cut": {"counts": {}, "ended": "out of time"},
        "broken": {"failed": "the process ended with 75"},
    }
    before = context(tmp_path)
    for key, row in rows.items():
        before.save(key, row)
    made = []
    for keep in (False, True):
        now = context(tmp_path)
        now.keep = keep
        for key in (*rows, "new"):
            now.attempt(key, lambda key=key: made.append(key) or rows.get(key, good))
    assert made == [*rows, "new", "wrong", "cut", "broken"]


def test_only_the_first_cases_of_a_part(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("fastrec.backend").backend.NATIVE, "cpu", "reference")
    found = context(tmp_path)
    found.limit = 2
    ops.section_of("encoder")(found)
    first = [entry.key for entry in ops.module("encoder_pieces").SMOKE[:2]]
    assert list(found.results.rows("encoder")) == first


def test_targets_stand_beside_what_was_measured(tmp_path):
    entry = cases.MEASURED["linear_ce"].entries[0]
    times = {"median": 0.005, "p10": 0.004, "p20": 0.0045, "floor_share": 0.5}
    ours = {"both": times, "launched": {"median": 0.0055}, "peak_bytes": 2**20}
    peers = {"eager": {"ratio": 12.0}, "liger chunk 512": {"ratio": 3.0}, "liger": {"ratio": 90.0}}
    found = context(tmp_path, "linear_ce")
    found.save(entry.key, {"implementations": {"fastrec": ours} | peers, "clock_mhz": 1755})
    found.results.begin("budget", {})
    found.section = "budget"
    for key, row in {"a": {"passed": True}, "b": {"failed": "x"}}.items():
        found.save(key, row)
    rows = {case: measured for case, _, measured in targets.lines(found.results.data)}
    assert rows["CE 4096 x 1M x 64 bf16"] == (
        f"{entry.key}: 5 ms (10 %: 4), 2.00 floors, with launches 5.5 ms, eager 12.00x,"
        " liger, defaults 90.00x, liger, best 3.00x, 1 MiB, 1755 MHz"
    )
    assert rows["budgets of all ops"] == "1 of 2 pass; failed: b"
    assert rows["op tests"] == "not measured"
