# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/gpu_evidence.py` without a GPU: every section on CPU tensors and tiny shapes, results
that survive interruptions, and what is done around CUDA calls with these replaced. No test asserts
a time."""

import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
pytest.importorskip("triton")
from benchmarks import gpu_evidence  # noqa: E402
from benchmarks.gpu import (  # noqa: E402
    cases,
    checks,
    correct,
    ops,
    plans,
    programs,
    render,
    step,
    targets,
    uprec,
)
from benchmarks.gpu.context import Context, DeviceLost, Results  # noqa: E402

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


def test_a_wrong_gradient_of_attention_is_seen(tmp_path, monkeypatch):
    """The program's lines become rows; an error beyond the budget and a bad end are failures."""
    lines = [
        "ran D=32 L=50\t0.300",
        "ran D=64 L=50\t7.100",
        "ran D=16 L=50\tnan",
        "========= Error",
    ]

    def program(command, seconds, line, environment):
        assert command[1:] == ["-m", "benchmarks.gpu.correct", "attention", "cpu", "tiny"]
        for text in lines:
            line(text)
        return "exit code 99"

    monkeypatch.setattr(programs, "run_lines", program)
    monkeypatch.setattr(programs, "sanitizer", lambda: None)
    found = context(tmp_path, "attention_backward")
    programs.attention_backward(found)
    rows = found.results.rows("attention_backward")
    assert "failed" not in rows["D=32 L=50"]
    assert rows["D=64 L=50"]["failed"] == "7.100 times the budget"
    assert rows["D=16 L=50"]["failed"] == "nan times the budget"
    assert rows["ended"]["failed"] == "exit code 99 after 3 cases"
    ends = {"": "some are beyond it", "exit code 1": "exit code 1 after 3 cases"}
    for why, text in ends.items():
        monkeypatch.setattr(programs, "run_lines", lambda *rest, why=why: program(*rest) and why)
        found.finished.clear()
        programs.attention_backward(found)
        assert rows["ended"]["failed"] == text


def test_samples_beyond_the_budget_and_those_that_did_not_run(tmp_path, monkeypatch):
    every = [key for _, _, key in checks.samples("cpu", True)]

    def program(command, seconds, line, environment):
        assert command[1:] == ["-m", "benchmarks.gpu.correct", "budget", "cpu", "tiny"]
        line(f"ran {every[0]}")  # the end of a line is stripped
        line(f"ran {every[1]}\toutput 3 > 1")
        return "exit code 1"

    monkeypatch.setattr(programs, "run_lines", program)
    found = context(tmp_path, "budget")
    programs.budget(found)
    rows = found.results.rows("budget")
    assert rows[every[0]] == {"passed": True} and rows[every[1]] == {"failed": "output 3 > 1"}
    assert rows["ended"]["failed"].startswith(f"exit code 1 before {every[2]}, ")
    assert (rows["ended"]["ran"], rows["ended"]["of"]) == (2, len(every))

    def complete(command, seconds, line, environment):
        for key in every:
            line(f"ran {key}\toutput 3 > 1" if key == every[1] else f"ran {key}")
        return ""

    monkeypatch.setattr(programs, "run_lines", complete)
    found.finished.clear()
    programs.budget(found)
    assert "failed" in rows["ended"], "the second plan would take it for good"


def test_wrong_numbers_are_beyond_the_budget(monkeypatch):
    op, sample, _ = next(checks.samples("cpu", True))
    assert correct.beyond_budget(op, sample) == []
    slightly = dataclasses.replace(op, function=lambda **k: 1.05 * op.function(**k))
    assert correct.beyond_budget(slightly, sample)


def test_training_is_judged_where_its_data_is(tmp_path, monkeypatch):
    found = context(tmp_path, "sasrec")
    found.tiny = False
    monkeypatch.setattr(programs, "ML_1M", programs.ROOT / "data" / "no-such.txt")
    programs.sasrec(found)
    assert found.results.rows("sasrec")["ml-1m"] == {"absent": "data/no-such.txt is not there"}
    (tmp_path / "ml-1m.txt").write_text("1 1\n")
    monkeypatch.setattr(programs, "ML_1M", tmp_path / "ml-1m.txt")
    called = []

    def program(command, seconds, line):
        called.append(command[3])
        line("step 250: NDCG@10 0.1")
        if command[3] == "evaluate":
            Path(command[-1]).write_text(json.dumps({"metrics": {"model": {"NDCG@10": 0.19}}}))
        return ""

    monkeypatch.setattr(programs, "run_lines", program)
    found.finished.clear()
    programs.sasrec(found)
    row = found.results.rows("sasrec")["ml-1m"]
    assert called == ["prepare", "pretrain", "evaluate"] and row["metrics"] == {"NDCG@10": 0.19}
    assert row["train_lines"] == ["0 s: step 250: NDCG@10 0.1"] and row["goal"] == 0.182
    (text,) = (row for case, _, row in targets.lines(found.results.data) if "sasrec" in case)
    assert text == "0.0 minutes, NDCG@10 0.1900"


def test_a_mask_that_differs_is_seen(tmp_path, monkeypatch):
    true = correct.kept

    def flipped(device, backend, width):
        found = true(device, "reference", width)
        if backend == "triton":
            found["bias_gelu_dropout"][0, 0] ^= True
        return found

    monkeypatch.setattr(correct, "kept", flipped)
    found = context(tmp_path, "masks")
    correct.masks(found)
    rows = found.results.rows("masks")
    failed = {name for name, row in rows.items() if "failed" in row}
    assert len(rows) == 4 and failed == {"bias_gelu_dropout"}


def context(tmp_path, section="encoder", seconds=60.0):
    found = Context("cpu", True, Results(tmp_path / "results.json"), section)
    found.deadline = time.time() + seconds
    found.results.begin(section, {"device": "test"})
    return found


def test_results_are_kept_until_the_environment_changes(tmp_path):
    now = context(tmp_path)
    now.save("a", {"x": 1})
    assert json.loads((tmp_path / "results.json").read_text())["sections"]["encoder"]["rows"]
    again = Results(tmp_path / "results.json")
    again.begin("encoder", {"device": "test"})
    again.begin("step", {"device": "test"})
    assert Results(tmp_path / "results.json").data["sections"]["step"]["rows"] == {}
    assert again.rows("encoder") == {"a": {"x": 1}}
    again.begin("encoder", {"device": "another"})
    assert again.rows("encoder") == {}
    (before,) = again.data["sections"]["encoder"]["earlier"]
    assert before["environment"] == {"device": "test"} and before["rows"] == {"a": {"x": 1}}
    assert not list(tmp_path.glob("*.partial"))


def test_a_section_is_cut_between_measurements(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("fastrec.backend").backend.NATIVE, "cpu", "reference")
    late = context(tmp_path, seconds=-1.0)
    ops.section_of("encoder")(late)
    assert late.results.rows("encoder") == {}
    # Time is up within a shape: fastrec is measured, what comes after it is not begun.
    entry = ops.module("encoder_pieces").SMOKE[0]
    row = ops.measure(cases.ENCODER, entry, late, ops.Clock("cpu"), 50, until=0.0)
    table = row["implementations"]
    assert table["eager"] == {"failed": "out of time"}
    assert table["fastrec"]["both"]["rounds"] == ops.FEW
    assert row["floor"]["both"]["seconds"] is None, "no ceilings have been probed"


@pytest.mark.parametrize("section", [step, uprec])
def test_a_step_that_is_cut_has_fastrec_first_and_is_made_again(section, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("fastrec.backend").backend.NATIVE, "cpu", "reference")
    late = context(tmp_path, seconds=-1.0)
    row = section._measure(section.TINY[0], late, ops.Clock("cpu"), 1)
    table = row["implementations"]
    ours = [name for name in table if name.startswith("fastrec")]
    assert list(table)[:2] == ours and len(ours) == 2
    assert all(table[name]["step"]["median"] > 0 for name in ours) and table["fastrec"]["kernels"]
    others = [table[name] for name in table if name not in ours]
    assert len(others) >= 2 and all(found == {"failed": "out of time"} for found in others)
    late.save("a step", row)
    assert not late.have("a step")


def test_a_row_that_is_cut_is_not_finished(tmp_path, capsys):
    now = context(tmp_path)
    now.keep = True
    cut = {"failed": "out of time"}

    def row(**peers):
        return {"implementations": {"fastrec": {"both": {}}} | peers}

    def stored():
        return now.results.rows("encoder")["a"]

    now.save("a", row(eager=cut, compiled=cut))
    assert not now.have("a") and "#" not in capsys.readouterr().out
    assert now.new_first(["a", "b", "c"], str) == ["b", "c", "a"]
    now.save("a", row(eager={"ratio": 2.0}, compiled=cut))
    assert stored()["implementations"]["eager"] == {"ratio": 2.0} and not now.have("a")
    now.save("a", row(eager=cut, compiled=cut))
    assert stored()["implementations"]["eager"] == {"ratio": 2.0}, "there was less time"
    now.attempt("a", lambda: row(eager={"ratio": 3.0}, compiled={"failed": "not installed"}))
    assert stored()["implementations"]["eager"] == {"ratio": 3.0} and now.have("a")
    assert "#encoder\ta\n" in capsys.readouterr().out
    now.limit = 2
    assert now.new_first(["a", "b", "c"], str) == ["b", "a"]


def nan_gradient(out: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """The same numbers; the gradient of `leaf` is NaN."""
    copy = leaf.view_as(leaf)
    if copy.requires_grad:
        copy.register_hook(lambda grad: grad * float("nan"))
    return out + 0 * copy.sum()


@pytest.mark.parametrize(
    "wrong", [lambda out, *inputs: 1.01 * out, lambda out, *inputs: nan_gradient(out, inputs[3])]
)
def test_wrong_results_have_no_time(wrong, tmp_path, monkeypatch):
    module = ops.module("encoder_pieces")
    true = module.implementations

    def broken(entry, compiler):
        table = true(entry, compiler)
        return table | {"fastrec": lambda *inputs: wrong(table["fastrec"](*inputs), *inputs)}

    monkeypatch.setattr(module, "implementations", broken)
    row = ops.measure(
        cases.ENCODER, module.SMOKE[0], context(tmp_path), ops.Clock("cpu"), 1, until=0.0
    )
    assert "no times" in row["implementations"]["fastrec"]["failed"]
    assert "both" not in row["implementations"]["fastrec"]


def test_a_gradient_from_a_graph_that_is_nan_is_seen(tmp_path, monkeypatch):
    model, joint, batches = uprec.cpu.setting(3, 4, 50, 16, 40, 1, 1)
    modules, true = torch.nn.ModuleList([model, joint]), uprec._graphed

    def graphed(modules, context):
        loss, last = true(modules, context), [*modules.parameters()][-1]
        return lambda batch, step: nan_gradient(loss(batch, step), last)

    assert uprec._difference(modules, batches, context(tmp_path)) < 1e-3
    monkeypatch.setattr(uprec, "_graphed", graphed)
    assert not uprec._difference(modules, batches, context(tmp_path)) < 1e-3


def test_a_graph_that_differs_is_seen(tmp_path, monkeypatch):
    _, sample, _ = next(checks.samples("cpu", True))
    state = [0.0]

    class Forgetful:
        differentiable: tuple = ()

        @staticmethod
        def function(**kwargs):
            state[0] += 1
            return torch.full((2,), state[0], requires_grad=True) * 1

    monkeypatch.setattr(checks, "samples", lambda *_: iter([(Forgetful, sample, "key")]))
    monkeypatch.setattr("op_db.case.gradients", lambda *_, **__: {})
    found = context(tmp_path, "graphs")
    checks.graphs(found)
    assert "other bits" in found.results.rows("graphs")["key"]["failed"]


def test_without_pytest(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    found = context(tmp_path, "test")
    programs.test(found)
    (key, row), *_ = found.results.rows("test").items()
    assert key == "bias_gelu_dropout float32" and row["samples"] > 3 and "failed" not in row


def test_a_program_is_ended_in_time_with_its_children():
    lines: list = []
    begin = time.time()
    ended = programs.run_lines(["sh", "-c", "echo one; sleep 60 & wait"], 1.0, lines.append)
    assert ended == "out of time" and lines == ["one"] and time.time() - begin < 30


def test_a_lost_device_ends_the_process(tmp_path, monkeypatch):
    found = context(tmp_path)
    found.device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    row = found.rescue(torch.cuda.OutOfMemoryError("tried to allocate"))
    assert row == {"failed": "OutOfMemoryError: out of memory"}

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(DeviceLost, match="a first error"):
        found.rescue(RuntimeError("a first error"))
