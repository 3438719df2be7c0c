"""What is shipped: an sdist that builds, a wheel without a top-level `kernels`, no compiler. And
folders whose listing is the list of ops."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from op_db import OPS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the sdist, as on a machine without a C++ compiler."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    tracked = ("fastrec", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in")
    source.mkdir()
    for name in (*tracked, "README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    for stale in source.rglob("*.so"):
        stale.unlink()
    environment = {**os.environ, "CXX": "no-such-compiler"}
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
    ):
        assert expected in names
    for kind in ("*.py", "*.yaml"):
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
