# SPDX-License-Identifier: Apache-2.0
"""What is shipped: an sdist that builds, a wheel without a top-level `kernels`, no compiler. And
folders whose listing is the list of ops."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from op_db import OPS

import fastrec

ROOT = Path(__file__).parent.parent


def _source(folder: Path) -> Path:
    folder.mkdir()
    tracked = ("fastrec", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in")
    for name in (*tracked, "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for stale in folder.rglob("*.so"):
        stale.unlink()
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the sdist, as on a machine without a C++ compiler."""
    folder = tmp_path_factory.mktemp("dist")
    source = _source(folder / "source")
    environment = os.environ | {"PATH": str(Path(sys.executable).parent)}
    environment.pop("CXX", None)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True, env=environment, capture_output=True, timeout=900,
    )  # fmt: skip
    assert len(list(folder.glob("fastrec-*.tar.gz"))) == 1
    (wheel,) = folder.glob("fastrec-*.whl")
    return wheel


def test_wheel_holds_the_package_and_nothing_beside_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fastrec", wheel.name[:13] + ".dist-info"}
    for expected in (
        "fastrec/kernels/linear_cross_entropy.py",
        "fastrec/kernels/common/tiles.py",
        "fastrec/recipes/uprec-mip.yaml",
        "fastrec/py.typed",
        "fastrec/ops/linear_cross_entropy.py",
        "fastrec/data/steps/crop.py",
        "fastrec/ops/common/native.py",
        wheel.name[:13] + ".dist-info/licenses/LICENSE",
    ):
        assert expected in names
    for kind in ("*.py", "*.yaml", "*.txt"):
        for file in (ROOT / "fastrec").rglob(kind):
            assert file.relative_to(ROOT).as_posix() in names, "is its folder in setup.py?"


@pytest.mark.parametrize("folder", ["fastrec/ops", "kernels", "csrc"])
def test_the_folders_of_the_ops_hold_nothing_else(folder):
    found = {file.stem for file in (ROOT / folder).glob("*.*")} - {"__init__", "module"}
    ops = {op.name for op in OPS}
    assert found == ops if folder == "fastrec/ops" else found <= ops


def test_without_the_extension_the_reference_serves_and_says_so_once(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = """
import sys, warnings
# An editable install of this checkout would offer its own fastrec._C.
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
import torch, fastrec
assert fastrec.__file__.startswith({root!r}), fastrec.__file__
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        x = torch.randn(4, 3, requires_grad=True)
        fastrec.linear_cross_entropy(x, torch.randn(9, 3), torch.tensor([0, 8, 1, 2])).backward()
ours = [str(w.message) for w in said if "fastrec" in str(w.message)]
assert len(ours) == 1 and "extension is not built" in ours[0], ours
"""
    subprocess.run(
        [sys.executable, "-c", script.format(root=str(tmp_path))],
        check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip


def test_the_extension_is_for_every_later_python():
    import fastrec._C

    assert fastrec._C.__file__.endswith("_C.abi3.so")
    used = subprocess.run(
        ["nm", "-D", "--undefined-only", fastrec._C.__file__], text=True, capture_output=True
    ).stdout
    names = {line.split()[-1] for line in used.splitlines()}
    assert not any(name.startswith("_Py") for name in names), "of the stable interface alone"


def _build(source: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=source, text=True,
        env=os.environ | {"MAX_JOBS": "1"} | environment, capture_output=True, timeout=300,
    )  # fmt: skip


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_flags_of_the_build_win_and_cxx_may_begin_with_a_launcher(tmp_path):
    """A compiler that only writes down how it is called."""
    source = _source(tmp_path / "source")
    programs, calls = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir()
    touch = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done'
    _program(programs / "g++", f'echo "$@" >> {calls}\n{touch}')
    _program(programs / "launcher", '[ "$1" = --version ] || exec "$@"')
    built = _build(
        source, PATH=f"{programs}:{os.environ['PATH']}", CXX="launcher g++", CFLAGS="-ffast-math"
    )
    assert built.returncode == 0, built.stderr[-2000:]
    compiled = [call for call in calls.read_text().splitlines() if " -c " in call]
    assert len(compiled) == len(list((ROOT / "csrc").rglob("*.cpp")))
    for call in compiled:
        assert -1 < call.index("-ffast-math") < call.index("-fno-fast-math")
    assert list(source.glob("fastrec/*.so"))


def test_a_compiler_that_is_named_must_exist(tmp_path):
    built = _build(_source(tmp_path / "source"), CXX="no-such-g++")
    assert built.returncode != 0
    assert "CXX is 'no-such-g++', and there is no no-such-g++" in built.stderr


def test_an_old_setuptools_is_refused_in_one_line(tmp_path):
    old = tmp_path / "old" / "setuptools"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text('__version__ = "65.5.0"\n')
    built = _build(_source(tmp_path / "source"), PYTHONPATH=str(old.parent))
    assert built.returncode != 0
    (line,) = built.stderr.splitlines()
    assert "built by setuptools 77 or later, here is 65.5.0: pip install 'setuptools>=77'" in line
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "setuptools>=77" in project["build-system"]["requires"]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("flags, stops", [("-O2", False), ("-ffast-math", True), ("-Ofast", True)])
def test_fast_math_does_not_compile(flags, stops):
    tried = subprocess.run(
        ["g++", "-fsyntax-only", "-std=c++17", flags, "-I", ROOT / "csrc/common", "-x", "c++", "-"],
        input='#include "simd.h"\n', text=True, capture_output=True,
    )  # fmt: skip
    assert ("IEEE arithmetic" in tried.stderr) == stops, tried.stderr


def test_small_numbers_survive_the_extension():
    """A library linked with -ffast-math makes the processor round them to 0, everywhere."""
    assert torch.tensor([1e-39]).mul(0.5).item() > 0


def test_the_package_can_be_reloaded():
    importlib.reload(fastrec)
    assert fastrec.linear(torch.ones(1, 2), torch.ones(3, 2)).tolist() == [[2.0, 2.0, 2.0]]


def test_one_version_and_one_licence_are_named_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    latest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1].split()[0]
    (wheel,) = re.findall(r"dist/fastrec-(.*?)-", (ROOT / "README.md").read_text())
    assert {project["version"], citation["version"], latest, wheel} == {fastrec.__version__}
    assert project["license"] == citation["license"] == "Apache-2.0"


def test_every_source_names_its_licence():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True).stdout
    files = [ROOT / name for name in listed.split() if name.endswith((".py", ".cpp", ".h"))]
    if not files:
        pytest.skip("no git checkout")
    without = [
        str(file.relative_to(ROOT))
        for file in files
        if file.stat().st_size
        and "SPDX-License-Identifier: Apache-2.0" not in file.open().readline()
    ]
    assert without == []
