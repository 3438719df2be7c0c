# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run: tiny shapes, JSON and tables. No test asserts a time."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import synthetic
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import (  # noqa: E402
    bench,
    encoder_pieces,
    encoders,
    epoch,
    integrations,
    roofline,
    run,
    step_profile,
    uprec_step,
)
from benchmarks.bench import OPS, module, peak_memory  # noqa: E402


def benchmark(*arguments):
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "smoke.json"
    benchmark("--smoke", "--output", path)
    return path


def test_smoke(output):
    results = json.loads(output.read_text())
    assert set(results["environments"]) == set(OPS)
    for found in results["environments"].values():
        assert {"cpu", "flags", "threads", "torch", "date"} <= set(found)
        assert not str(found).count("/"), "no machine paths"
    assert set(results["ops"]) == set(OPS)
    everything = results["ops"]["linear_cross_entropy"]["N=33 V=257 D=16 float32 flat"]
    assert {"fastrec", "eager", "torch.compile", "reference"} <= set(everything)
    every = [(op, key, rows) for op in OPS for key, rows in results["ops"][op].items()]
    for op, key, rows in every:
        for name, row in rows.items():
            assert "failed" not in row, f"{op} {key} {name}: {row}"
            limit = 5e-2 if "bfloat16" in key else 1e-5
            assert 0 <= row["output_error"] <= limit and 0 <= row["gradient_error"] <= limit, name
            for kind in module(op).PASSES:
                assert row[kind]["p20"] <= row[kind]["median"] <= row[kind]["p80"]
        assert rows["fastrec"]["ratio"] == 1
    assert next(iter(results["ops"][OPS[0]].values()))["fastrec"]["extra_bytes"] >= 0


def test_the_largest_is_nan_where_one_is():
    for values in ((1e-7, math.nan), (math.nan, 1e-7), (1e-7, math.nan, 1.0)):
        assert math.isnan(bench.largest(values)), values
    assert bench.largest((1e-7, 2.0, 1.0)) == 2 and bench.largest(()) == 0


def poisoned(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """The same number; the gradient of `leaf` is NaN."""
    if not loss.requires_grad:
        return loss
    copy = leaf.view_as(leaf)
    copy.register_hook(lambda grad: grad * math.nan)
    return loss + 0 * copy.sum()


def instead_of_fastrec(monkeypatch, op: str, broken) -> None:
    """`broken` makes what is called as fastrec of what fastrec calls."""
    true = module(op).implementations

    def implementations(entry, compiler):
        table = true(entry, compiler)
        return table | {"fastrec": broken(table["fastrec"])}

    monkeypatch.setattr(module(op), "implementations", implementations)


def measure_smoke(op: str, kind: int = 0) -> dict:
    return bench.measure(replace(module(op).SMOKE[kind], only=("fastrec",)), 1, "aot_eager")


RANKED = ("linear_rank", "linear_topk")


@pytest.mark.parametrize("op", [op for op in OPS if op not in RANKED])
def test_a_last_gradient_that_is_nan_has_no_time(op, monkeypatch):
    def broken(function):
        def run(*inputs):
            leaves = [x for x in inputs if getattr(x, "requires_grad", False)]
            return poisoned(function(*inputs), leaves[-1])

        return run

    def broken_step(model, joint, batch, true=uprec_step.fastrec_loss):
        return poisoned(true(model, joint, batch), [*model.parameters(), *joint.parameters()][-1])

    assert measure_smoke(op)["fastrec"]["ratio"] == 1
    if op == "uprec_step":  # the gradients are those of the parameters
        monkeypatch.setattr(uprec_step, "fastrec_loss", broken_step)
    else:
        instead_of_fastrec(monkeypatch, op, broken)
    with pytest.raises(SystemExit, match="no times reported"):
        measure_smoke(op)


@pytest.mark.parametrize(
    ("op", "broken"),
    [
        ("linear_rank", lambda ranks: ranks + 1),
        ("linear_rank", lambda ranks: ranks + (torch.arange(len(ranks)) == 7)),
        ("linear_topk", lambda found: (1.001 * found[0], found[1])),
        ("linear_topk", lambda found: (found[0], found[1].flip(1))),
        ("linear_topk", lambda found: (found[0] * math.nan, found[1])),
    ],
)
@pytest.mark.parametrize("kind", [0, 1])
def test_a_wrong_ranking_has_no_time(op, broken, kind, monkeypatch):
    """One rank of one row, a returned score, the order; in float32 and in bfloat16."""
    assert measure_smoke(op, kind)["fastrec"]["ratio"] == 1
    instead_of_fastrec(monkeypatch, op, lambda true: lambda *inputs: broken(true(*inputs)))
    with pytest.raises(SystemExit, match="no times reported"):
        measure_smoke(op, kind)


class Written(TorchDispatchMode):
    """Names of the operators, in turn, whose result is a new tensor of `size` numbers."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple) else (out,):
            views = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if each.numel() == self.size and each.data_ptr() not in views:
                self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize(
    ("op", "case", "names"),
    [
        ("in_batch_cross_entropy", "dot", ["mm", "_log_softmax"]),
        ("in_batch_cross_entropy", "dot lists", ["zeros", "mm", "_log_softmax"]),
        ("in_batch_cross_entropy", "weighted_l2 groups", ["eq", "mm", "sub", "_log_softmax"]),
        ("in_batch_hardest", "dot groups", ["eq", "mm"]),
        ("in_batch_hardest", "weighted_l2 groups", ["eq", "mm", "sub"]),
        ("multilabel_bce", "", ["new_zeros", "mm"]),
    ],
)
def test_an_eager_peer_writes_no_more_than_it_needs(op, case, names):
    """Of what is as large as the scores: a peer that copies it once more is not the best one."""
    entry = replace(module(op).SMOKE[0], dtype="float32", case=case)
    eager = module(op).implementations(entry, "aot_eager")["eager"]
    with Written(module(op).work(entry)["elements"]) as found:
        bench.forward(eager, module(op).problem(entry))
    assert sorted(found.names) == sorted(names)


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", OPS[1:])
def test_the_peak_memory_of_the_other_ops_is_found(op):
    assert peak_memory(module(op).SMOKE[0], "fastrec") >= 0


@pytest.mark.parametrize("name", ["fastrec", "eager", "torch.compile"])
def test_what_a_step_keeps_is_in_the_peak_memory_of_all(name, monkeypatch):
    """The pass that is measured makes parameters, gradients and moments of its own."""
    true, steps = uprec_step.implementations, []

    def noted(function, inputs):
        steps.append(list(inputs[0].steps))
        return function(*inputs)

    monkeypatch.setattr(uprec_step, "implementations", lambda entry, _: true(entry, "aot_eager"))
    monkeypatch.setitem(bench.PASS, "step", noted)
    bench._peak_here(uprec_step.SMOKE[1], name)
    assert steps == [[], []]


def test_a_shape_that_no_entry_has_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--op", "linear_rank", "--shape", "N=7777"])
    assert "no entry contains 'N=7777'; there are: N=" in capsys.readouterr().err


def test_table_replaces_the_marked_block(output, tmp_path):
    before, after = "# Title\n\n", "\n\nafter\n"
    page = tmp_path / "docs" / "results" / "speed.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"{before}<!-- bench:linear_cross_entropy -->\nold\n<!-- /bench -->{after}")
    for _ in range(2):  # the second time replaces the same block
        out = benchmark("--render", "--table", "--table-root", tmp_path, "--output", output)
    assert "speed.md has no block for linear_rank" in out
    assert "README.md keeps its table: not measured are linear_cross_entropy N=2560 V=" in out
    text = page.read_text()
    assert text.count("| N=33 V=257 D=16") == 4
    assert text.startswith(before) and text.endswith(after) and "old" not in text
    assert text.count("<!-- bench:") == text.count("<!-- /bench -->") == 1
    entries = json.loads(output.read_text())["ops"].values()
    assert "float64" in text and out.count("| fastrec |") == sum(map(len, entries))


def test_headlines_are_entries_and_stay_where_one_was_not_measured(output, tmp_path, capsys):
    for op, key in run.HEADLINES:
        assert key in [entry.key for entry in module(op).ENTRIES], (op, key)
    results = json.loads(output.read_text())
    for op, key in run.HEADLINES:
        results["ops"][op][key] = next(iter(results["ops"][op].values()))
    page, text = tmp_path / run.README, "<!-- bench:headlines -->\nkept\n<!-- /bench -->\n"
    page.write_text(text)
    run.write_tables(results, tmp_path)
    head, line, row, *_ = page.read_text().splitlines()[2:]
    assert head.count("|") == line.count("|") == row.count("|") == 8
    op, key = run.HEADLINES[0]
    assert row.startswith(f"| `{op}`, forward + backward | N=2560 V=141939 D=64 flat |")
    capsys.readouterr()
    page.write_text(text)
    del results["ops"][op][key]
    run.write_tables(results, tmp_path)
    assert page.read_text() == text
    assert f"README.md keeps its table: not measured are {op} {key}\n" in capsys.readouterr().out


def test_a_table_is_of_results_that_are_kept(tmp_path, monkeypatch, capsys):
    def measured(*_):
        raise AssertionError("nothing is measured for a table that is refused")

    monkeypatch.setattr(run, "measured", measured)
    output = ["--output", str(tmp_path / "smoke.json")]
    for flags, why in (([], "--table needs --output"), (["--smoke", *output], "not for --smoke")):
        with pytest.raises(SystemExit):
            run.main(["--table", *flags])
        assert why in capsys.readouterr().err


def test_the_tables_in_the_documents_are_those_of_the_stored_results(tmp_path):
    """Nobody edits a number by hand."""
    pages = [run.README, run.SPEED]
    for page in pages:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text((ROOT / page).read_text())
    stored = ROOT / "benchmarks" / "results" / "cpu.json"
    out = benchmark("--render", "--table", "--table-root", tmp_path, "--output", stored)
    assert "has no block" not in out
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), page


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(roofline, "SIZES", (64, 128))
    monkeypatch.setattr(roofline, "COPIED", 1 << 16)
    monkeypatch.setattr(roofline, "LOOPS", 10_000)


def test_ceilings(quick):
    found = roofline.ceilings()
    assert set(found) == {"fma_gflops", "gflops", "gbytes_per_s"} and min(found.values()) > 0


def test_roofline(quick, tmp_path):
    path, picture = tmp_path / "roofline.json", tmp_path / "roofline.png"
    flags = ["--output", str(path), "--picture", str(picture)]
    roofline.main(["--smoke", "--rounds=1", "--op", "linear_cross_entropy", "linear_rank", *flags])
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = json.loads(path.read_text())
    assert set(results["ops"]) == {"linear_cross_entropy", "linear_rank"}
    assert all("float32" in key for rows in results["ops"].values() for key in rows)
    _, label, intensity, rate = roofline.points(results)[0]
    assert label == "33 257 16 flat" and rate > 0
    assert intensity == 6 * 33 * 257 * 16 / (3 * 257 * 16 * 4)
    before = path.read_text()
    roofline.main(["--render", *flags])
    assert path.read_text() == before


def test_no_stored_point_is_above_the_roof():
    """The roof and the points are of one machine, and the roof is what it can do."""
    results = json.loads((ROOT / "benchmarks" / "results" / "roofline.json").read_text())
    assert set(results["ops"]) == set(OPS)
    roof = results["ceilings"]
    for op, label, _, rate in roofline.points(results):
        assert rate <= roof["fma_gflops"], (op, label)
    assert roof["gflops"] <= roof["fma_gflops"]


def test_the_plot_of_a_step_reads_the_table_beside_it():
    parts = {
        part: 0.01 * place for place, part in enumerate((*step_profile.PARTS, "everything else"))
    }
    profiles = {"B=768 float32": parts, "B=9 float32 x": {part: 0.25 for part in parts}}
    table = step_profile.render(profiles)
    page = f"| a |\n<!-- bench:step_profile -->\n\n{table}\n\n<!-- /bench -->\n| b |\n"
    for name, found in step_profile.stored(page).items():
        assert found == pytest.approx({part: 1e3 * each for part, each in profiles[name].items()})


def test_pytest_benchmark_entries_are_collected():
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout
    assert "test_bench.py" in process.stdout


@pytest.mark.parametrize(
    ("name", "printed"),
    [("relations", "% of a step on one CPU core"), ("data", "gather + one_of"),
     ("step_profile", "| softmax over the items |")],
)  # fmt: skip
def test_other_commands_run(name, printed, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--smoke"])
    importlib.import_module(f"benchmarks.{name}").main()
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize(
    "part",
    ["asked", "dilated", "caser", "patches", "everyone", "request --only Recommender",
     pytest.param("request", marks=pytest.mark.exhaustive)],
)  # fmt: skip
def test_encoders_beside_their_peers_on_a_data_set(part, tmp_path, monkeypatch, capsys):
    data = synthetic(tmp_path, num_users=60, num_items=40)
    options = [*part.split(), "--data", str(data), "--length", "12", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["encoders.py", *options])
    importlib.import_module("benchmarks.encoders").main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 - ("--only" in part)
    assert re.search(r"\d+\.\d\d ms   1\.00, 1\.00$", lines[1]), lines


def test_a_name_that_no_peer_has_is_refused(tmp_path, monkeypatch, capsys):
    data = synthetic(tmp_path, num_users=60, num_items=40)
    monkeypatch.setattr("sys.argv", ["encoders.py", "dilated", f"--data={data}", "--only=xyz"])
    with pytest.raises(SystemExit):
        encoders.main()
    why = "none of fastrec, nn.Conv1d, padded has 'xyz' in its name"
    assert why in capsys.readouterr().err


def test_the_places_of_events_are_no_part_of_what_is_timed():
    for entry in encoder_pieces.SMOKE:
        inputs = encoder_pieces.problem(entry)
        for name, function in encoder_pieces.implementations(entry, "aot_eager").items():
            if name == "torch.compile":
                continue
            with torch.profiler.profile() as found:
                bench.forward(function, inputs)
            called = {event.key for event in found.key_averages()}
            if entry.case != encoder_pieces.POOL:
                assert not called & {"aten::arange", "aten::remainder", "aten::floor_divide"}, name


def test_a_step_of_another_library_begins_where_the_one_before_ended(monkeypatch):
    """As Lightning calls a callback: the batch is fetched between the end and the start."""
    now, switched = [0.0], []
    monkeypatch.setattr(integrations.time, "process_time", lambda: now[0])
    monkeypatch.setattr(integrations.fastrec, "patch", lambda library: switched.append(library))
    monkeypatch.setattr(integrations.fastrec, "unpatch", lambda *_: switched.append(""))
    nothing = dict.fromkeys(("on_train_start", "on_train_batch_start"), lambda *_: None)
    callback, spent = integrations.alternate_steps("rectools", type("Base", (), nothing))
    callback.on_train_start(None, None)
    for index in (0, 1, 2, 0, 1):  # two epochs
        now[0] += 3  # the batch
        callback.on_train_batch_start(None, None, None, index)
        now[0] += 10 if switched[-1] else 20  # the rest
        callback.on_train_batch_end(None, None, None, None, index)
    assert spent == {False: [23, 23, 23], True: [13, 13]}


def test_a_step_of_one_process(monkeypatch, capsys):
    options = ["--items", "500", "--steps", "1", "--batch", "16", "--how", "copies"]
    monkeypatch.setattr("sys.argv", ["processes.py", *options])
    importlib.import_module("benchmarks.processes").main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["median"] > 0 and 0 < found["loss"] < 10


def test_views_beside_a_loop_over_users(tmp_path, monkeypatch, capsys):
    data = synthetic(tmp_path, num_users=60, num_items=40)
    monkeypatch.setattr("sys.argv", ["views.py", "--data", str(data), "--smoke"])
    importlib.import_module("benchmarks.views").main()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in ("cl4srec", "duorec", "coserec")] == lines[1::4]
    assert len(lines) == 13 and re.search(r"loop over users +\d+\.\d\d, .* ms ", lines[3]), lines


def test_steps_of_an_epoch_on_a_file(tmp_path):
    """The peers of this command are in environments of their own."""
    source = tmp_path / "Tiny.txt"  # every item is followed by the next number
    chains = [(user, range(user % 30, user % 30 + 7)) for user in range(300)]
    source.write_text("".join(f"{u} {' '.join(str(i % 30) for i in c)}\n" for u, c in chains))
    options = f"fastrec --source {source} --steps 300 --evaluate".split()
    printed = subprocess.run(
        [sys.executable, "benchmarks/epoch.py", *options],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert re.search(r"^fastrec: [\d.]+ s a step .* 2 steps an epoch", printed), printed
    found = re.search(r"after 300 steps, .* HR@10 ([\d.]+), NDCG@10 ", printed)
    assert found and float(found[1]) > 0.8, printed  # at random 0.33


def test_an_epoch_has_the_optimizer_of_the_peers_and_two_steps(tmp_path, monkeypatch, capsys):
    source, decays = tmp_path / "Tiny.txt", []
    source.write_text("".join(f"{u} {' '.join(str(u + i) for i in range(7))}\n" for u in range(9)))
    true = torch.optim.Optimizer.__init__

    def noted(self, parameters, defaults):
        decays.append(defaults["weight_decay"])
        true(self, parameters, defaults)

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", noted)
    epoch.fastrec(epoch.Task(source, "sasrec", 2, 4, 5, 0.1, 0, "none"), tmp_path)
    assert decays == [0]
    monkeypatch.setattr("sys.argv", ["epoch.py", "fastrec", f"--source={source}", "--steps=1"])
    with pytest.raises(SystemExit):
        epoch.main()
    assert "--steps 2 at least" in capsys.readouterr().err
