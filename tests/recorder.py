# SPDX-License-Identifier: Apache-2.0
"""A recorder of kernel launches for tests on meta tensors: it refuses what a launch would, host
tensors, float64, a grid axis that is too long."""

import contextlib
import functools
import importlib
import inspect
import pkgutil

import torch

import fastrec.kernels


class Recorder:
    """Stands in for a jitted kernel: `kernel[grid](*arguments)`."""

    def __init__(self, kernel, launches: list):
        self.name, self.launches = kernel.__name__, launches
        self.signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(
        self, grid, *arguments, num_warps=4, num_stages=3, enable_fp_fusion=False, **constants
    ):
        assert enable_fp_fusion, "products and sums would be two instructions: **FUSED"
        assert 1 <= len(grid) <= 3 and all(type(size) is int for size in grid)
        assert 0 <= grid[0] < 2**31 and all(0 <= size < 2**16 for size in grid[1:]), grid
        self.signature.bind(*arguments, **constants)
        for value in arguments:
            if isinstance(value, torch.Tensor):
                assert value.device.type == "meta", "a kernel got a host tensor"
                assert value.dtype != torch.float64, "a kernel got a float64 tensor"
            else:
                assert value is None or type(value) in (int, float), type(value)
        self.launches.append(self.name)


def record_launches(monkeypatch) -> list:
    """Names of the kernels launched; backend "triton" on meta tensors reaches the launchers."""
    seen: list = []
    found = pkgutil.walk_packages(fastrec.kernels.__path__, "fastrec.kernels.")
    names = [module.name for module in found]
    # All of them first: one imports kernels of another, which must not be recorders by then.
    for kernels in [importlib.import_module(name) for name in names]:
        for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), seen))
    monkeypatch.setattr("fastrec.backend.interpreting", lambda: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return seen
