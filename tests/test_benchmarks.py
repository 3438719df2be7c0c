# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run: tiny shapes, JSON and tables. No test asserts a time."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import synthetic

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import roofline, run, step_profile  # noqa: E402
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", OPS[1:])
def test_the_peak_memory_of_the_other_ops_is_found(op):
    assert peak_memory(module(op).SMOKE[0], "fastrec") >= 0


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
    assert "README.md has no block for headlines" in out
    text = page.read_text()
    assert text.count("| N=33 V=257 D=16") == 4
    assert text.startswith(before) and text.endswith(after) and "old" not in text
    assert text.count("<!-- bench:") == text.count("<!-- /bench -->") == 1
    entries = json.loads(output.read_text())["ops"].values()
    assert "float64" in text and out.count("| fastrec |") == sum(map(len, entries))


def test_headlines_are_entries_and_what_was_not_measured_is_left_out(output):
    for op, key in run.HEADLINES:
        assert key in [entry.key for entry in module(op).ENTRIES], (op, key)
    results = json.loads(output.read_text())
    op, key = run.HEADLINES[0]
    results["ops"][op][key] = next(iter(results["ops"][op].values()))
    head, line, row, *_ = run.headlines(results).splitlines()
    assert head.count("|") == line.count("|") == row.count("|") == 8
    assert row.startswith(f"| `{op}`, forward + backward | N=2560 V=141939 D=64 flat |")


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
