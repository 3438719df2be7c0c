# SPDX-License-Identifier: Apache-2.0
"""Choice of a backend: rules, messages, and what `import fastrec` costs."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import fastrec
from fastrec import backend as dispatch
from fastrec.backend import interpreting, resolve, unavailable_reason

OP = "linear_cross_entropy"
CAPABILITIES = ("amx", "avx512_bf16", "avx512", "avx2", "default")
CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
built = unavailable_reason("cpp", OP, CPU) is None
needs_extension = pytest.mark.skipif(not built, reason="the C++ extension is not built")


def python(code, stderr=False, **environment):
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stderr if stderr else process.stdout


def problem():
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(4, 3, generator=g),
        torch.randn(5, 3, generator=g),
        torch.tensor([0, 4, 2, 2]),
    )


@needs_extension
def test_native_backend_of_cpu():
    assert resolve(None, OP, CPU) == "cpp"


@pytest.mark.parametrize("name", ["reference", pytest.param("cpp", marks=needs_extension)])
def test_explicit_backend_is_taken_as_given(name):
    assert resolve(name, OP, CPU) == name
    assert resolve("reference", OP, META) == "reference"


def test_device_without_a_native_backend_takes_the_reference():
    assert resolve(None, OP, META) == "reference"


@pytest.mark.parametrize(
    "name, device, message",
    [
        ("cpp", CUDA, "backend='cpp': cpp runs on cpu, tensors are on cuda"),
        ("cuda", CPU, "backend='cuda': unknown backend, expected one of"),
        ("", CPU, "backend='': unknown backend"),
        ("Reference", CPU, "unknown backend"),
    ],
)
def test_explicit_backend_that_cannot_run_raises(name, device, message):
    with pytest.raises(RuntimeError, match=message):
        resolve(name, OP, device)


@pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1: triton runs on CPU tensors")
def test_triton_on_cpu_tensors_raises_through_the_op():
    message = "backend='triton': triton runs on cuda, tensors are on cpu"
    with pytest.raises(RuntimeError, match=message):
        resolve("triton", OP, CPU)
    with pytest.raises(RuntimeError, match=message):
        fastrec.linear_cross_entropy(*problem(), backend="triton")


def test_unknown_backend_raises_through_the_op():
    with pytest.raises(RuntimeError, match="backend='fast': unknown backend"):
        fastrec.linear_cross_entropy(*problem(), backend="fast")


@needs_extension
def test_op_without_a_kernel_is_said_so():
    torch.library.define("fastrec::no_such_kernel_fwd", "(Tensor x) -> Tensor")
    assert unavailable_reason("cpp", "no_such_kernel", CPU) == "no_such_kernel has no cpp kernel"
    with pytest.raises(RuntimeError, match="backend='cpp': no_such_kernel has no cpp kernel"):
        resolve("cpp", "no_such_kernel", CPU)
    dispatch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="no_such_kernel uses the slower reference backend"):
        assert resolve(None, "no_such_kernel", CPU) == "reference"


def test_reference_is_always_available():
    for device in (CPU, CUDA, META):
        assert unavailable_reason("reference", OP, device) is None


HEAVY = ("triton", "lightning", "polars", "pandas", "jsonargparse", "matplotlib", "torch._dynamo")


def test_import_is_light():
    """Nothing heavy beyond what `import torch` itself brings."""
    out = python(
        f"""
        import sys, time
        import torch
        before, start = set(sys.modules), time.perf_counter()
        import fastrec
        seconds = time.perf_counter() - start
        new = set(sys.modules) - before
        print(sorted(name for name in {HEAVY!r} if name in new))
        print(len(new), seconds)
        """
    )
    assert out.splitlines()[0] == "[]"
    assert int(out.splitlines()[1].split()[0]) < 100, "modules imported beyond torch"


@needs_extension
def test_cpu_capability_takes_narrower_vectors():
    code = "import torch, fastrec._C as c; print(c.vector_bytes, c.bf16)"
    said = {name: python(code, FASTREC_CPU_CAPABILITY=name) for name in ("", *CAPABILITIES)}
    sizes = {name: int(text.split()[0]) for name, text in said.items()}
    assert sizes[""] == sizes["avx512"] >= sizes["avx2"] >= sizes["default"] == 16
    assert sizes["avx2"] <= 32
    products = {name: text.split()[1:] for name, text in said.items()}
    assert products[""] == products["amx"] and products["avx512_bf16"] in ([], ["avx512_bf16"])
    assert products["avx512"] == products["avx2"] == products["default"] == []
    said = python(
        """
        try:
            import fastrec.backend
        except ValueError as error:
            print(error)
        """,
        FASTREC_CPU_CAPABILITY="sse",
    )
    assert (
        said
        == "FASTREC_CPU_CAPABILITY must be amx, avx512_bf16, avx512, avx2 or default, got sse\n"
    )


MISSING = """
    import sys, warnings
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name == "fastrec._C":
                raise {error}
    sys.meta_path.insert(0, Block())
    import torch, fastrec
    x, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 4, 2, 2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [fastrec.linear_cross_entropy(x, w, y) for _ in range(3)]
    said = [str(w.message) for w in caught if "fastrec" in str(w.message)]
    print(len(said), said[0])
    assert torch.equal(losses[0], fastrec.linear_cross_entropy(x, w, y, backend="reference"))
    try:
        fastrec.linear_cross_entropy(x, w, y, backend="cpp")
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize(
    "error, why",
    [
        ("ModuleNotFoundError(name)", "the C++ extension is not built"),
        ("ImportError('undefined symbol')", "the C++ extension does not load: undefined symbol"),
    ],
)
def test_missing_extension_falls_back_with_one_warning(error, why):
    warned, raised = python(MISSING.format(error=error)).splitlines()
    assert warned.startswith("1 fastrec: linear_cross_entropy uses the slower reference backend")
    assert why in warned
    assert raised.startswith(f"backend='cpp': {why}")
