# SPDX-License-Identifier: Apache-2.0
"""The sections of `benchmarks/gpu`: what is wrong is seen, what was cut is made again, and what is
done around CUDA calls with these replaced. No test asserts a time."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from gpu_context import context

from benchmarks.gpu import (
    cases,
    checks,
    correct,
    ops,
    programs,
    step,
    targets,
    uprec,
)
from benchmarks.gpu.context import DeviceLost, Results


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
