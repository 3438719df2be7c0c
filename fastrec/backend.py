# SPDX-License-Identifier: Apache-2.0
"""The only dispatch code: which backend serves an op on a device, and why another one cannot.

PyTorch's dispatcher holds the capabilities: an op has a C++ kernel when the dispatch key CPU is
filled, and a Triton launcher when CUDA is. `resolve` only translates names.
"""

import functools
import os
import warnings
from pathlib import Path

import torch

BACKENDS = ("reference", "cpp", "triton")
NATIVE = {"cpu": "cpp", "cuda": "triton"}

# Of `linear_cross_entropy` on triton, activations in 16 bits beside a float32 table: multiply by a
# copy of the table in 16 bits (V x D x 2 bytes during each pass) instead of converting every tile
# where it is read. The same products; set it before the forward pass: `backend.copy_tables = True`.
copy_tables = False


@functools.cache
def _load_extension() -> str | None:
    """Load `fastrec._C`, whose import registers the CPU kernels. Returns why that failed."""
    try:
        import fastrec._C  # noqa: F401
    except ModuleNotFoundError:
        return _not_built(Path(__file__).parent)
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


def _not_built(package: Path) -> str:
    where = f"the C++ extension is not built in {package}"
    if (package.parent / "setup.py").is_file():
        return f"{where}, a checkout, which hides an installed fastrec from a process started in it"
    return f"{where} (reinstall fastrec where a C++ compiler is found)"


_EXTENSION_ERROR = _load_extension()


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors through the interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_FOUND: set[tuple[str, str]] = set()  # asking the dispatcher takes 3 us, 5 % of a small call


def _has_kernel(op: str, key: str) -> bool:
    if (op, key) in _FOUND:
        return True
    # What has no backward has one pass, of its own name. One with a reference only has no schema.
    names = [name for name in (f"{op}_fwd", op) if hasattr(torch.ops.fastrec, name)]
    found = torch._C._dispatch_has_kernel_for_dispatch_key
    if not any(found(f"fastrec::{name}", key) for name in names):
        return False
    _FOUND.add((op, key))
    return True


# torch.compile takes the answer as a constant: torch.compiler.assume_constant_result, without its
# import of the compiler, which would double the import time of fastrec.
_has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable_reason(backend: str, op: str, device: torch.device) -> str | None:
    """Why `backend` cannot run `op` on `device`; None if it can."""
    if backend == "reference":
        return None
    if backend not in BACKENDS:
        return f"unknown backend, expected one of {BACKENDS}"
    if backend == "cpp":
        if device.type != "cpu":
            return f"cpp runs on cpu, tensors are on {device.type}"
        if _EXTENSION_ERROR:
            return _EXTENSION_ERROR
        key = "CPU"
    else:
        if device.type != "cuda" and not interpreting():
            return f"triton runs on cuda, tensors are on {device.type}"
        key = "CUDA"
    if not _has_kernel(op, key):
        return f"{op} has no {backend} kernel"
    return None


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def resolve(backend: str | None, op: str, device: torch.device) -> str:
    """The backend that serves `op` on `device`: the native one for None, else exactly `backend`.

    Raises RuntimeError with the reason when an explicit request cannot run, and inside a transform
    of torch.func. With None, a missing native backend means the reference, said once.
    """
    if backend != "reference" and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{op} under torch.func (grad, vmap, jvp) needs backend='reference': its kernels know"
            " autograd alone"
        )
    if backend is None:
        native = NATIVE.get(device.type, "reference")
        if why := unavailable_reason(native, op, device):
            if not torch.compiler.is_compiling():
                _say_once(f"fastrec: {op} uses the slower reference backend: {why}")
            return "reference"
        return native
    if why := unavailable_reason(backend, op, device):
        raise RuntimeError(f"backend={backend!r}: {why}")
    return backend


def device_of(name: str) -> torch.device:
    """The device that a person names: "cpu", "cuda", "cuda:1", or "auto", a GPU where there is one.

    Raises ValueError for another name and for a GPU that is not there.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"device is {name!r}, and PyTorch finds {gpus} GPUs")
    return device
