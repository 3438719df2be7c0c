# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/gpu_evidence.py` without a GPU: every section on CPU tensors and tiny shapes, results
that survive interruptions, and what is done around CUDA calls with these replaced. No test asserts
a time."""

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
from benchmarks.gpu import cases, checks, ops, programs, render  # noqa: E402
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
    """(output, results) of all sections."""
    folder = tmp_path_factory.mktemp("gpu")
    sanitizer = folder / "compute-sanitizer"
    sanitizer.write_text(FAKE_SANITIZER)
    sanitizer.chmod(sanitizer.stat().st_mode | stat.S_IXUSR)
    output = folder / "tiny.json"
    more = ("--minutes", 60)  # that a loaded machine leaves nothing out
    process = evidence("--tiny", "--sections", "all", *more, "--output", output, path=folder)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout, json.loads(output.read_text())


def failures(found):
    """Every text under the key "failed", wherever it is."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from [value] if key == "failed" else failures(value)


@pytest.mark.slow
def test_every_section_runs(everything):
    out, results = everything
    sections = results["sections"]
    assert list(sections) == list(gpu_evidence.SHARES)
    for name, section in sections.items():
        assert section["rows"], name
        wrong = [why for why in failures(section["rows"]) if "99" not in why]
        assert not wrong, f"{name}: {wrong}"
        assert f"\n== {name}\n" in out
    assert not re.search(r"(?<!\w)/(tmp|root|work|home)", json.dumps(results)), "machine paths"
    for name, measured in cases.MEASURED.items():
        for row in sections[name]["rows"].values():
            table = row["implementations"]
            ours = table["fastrec"]
            main = ours["forward" if name == "rank_topk" else "both"]
            assert ours["ratio"] == 1 and main["floor_share"] > 0
            assert main["p20"] <= main["median"] <= main["p80"]
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
    times = {"median": 0.002, "p20": 0.001, "p80": 0.003, "ps_per_element": 7.0}
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
    assert "| a shape | 2 (1 to 3) | 2 (1 to 3) | 7 | -, 25 % | 3.00x | - | 1 |" in text
    assert "No GPU has been measured in section `step` yet." in text


def test_documents_say_what_is_missing(tmp_path, capsys):
    (tmp_path / "README.md").write_text("<!-- gpu:linear_ce -->\n<!-- /gpu -->\n")
    assert render.update(tmp_path, render.newest(tmp_path)) == ["README.md"]
    assert "No GPU has been measured in section `linear_ce`" in (tmp_path / "README.md").read_text()
    assert "no GPU has been measured" in capsys.readouterr().out


def test_every_section_has_a_share_and_a_function():
    assert gpu_evidence.functions().keys() == gpu_evidence.SHARES.keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sections", "probe,nothing", "--tiny"], "'nothing' is none of probe"),
        (["--tiny"], "--tiny needs --output"),
        ([], "no CUDA device"),
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
    assert again.rows("encoder") == {"a": {"x": 1}}
    again.begin("encoder", {"device": "another"})
    assert again.rows("encoder") == {}
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


def test_wrong_results_have_no_time(tmp_path, monkeypatch):
    module = ops.module("encoder_pieces")
    true = module.implementations

    def broken(entry, compiler):
        table = true(entry, compiler)
        return table | {"fastrec": lambda *inputs: 1.01 * table["fastrec"](*inputs)}

    monkeypatch.setattr(module, "implementations", broken)
    row = ops.measure(
        cases.ENCODER, module.SMOKE[0], context(tmp_path), ops.Clock("cpu"), 1, until=0.0
    )
    assert "no times" in row["implementations"]["fastrec"]["failed"]
    assert "both" not in row["implementations"]["fastrec"]


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
