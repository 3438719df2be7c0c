# SPDX-License-Identifier: Apache-2.0
"""float32 on a GPU: products of two bfloat16 each unless "ieee" is asked for."""

import pytest
import torch
from op_check import check, need
from op_db import (
    in_batch_cross_entropy,
    jagged_attention,
    linear_cross_entropy,
    multilabel_bce,
    sampled_linear_cross_entropy,
)
from op_db.case import TYPES

tiles = pytest.importorskip("fastrec.kernels.common.tiles")
wide = pytest.importorskip("fastrec.kernels.common.linear_cross_entropy_wide")
launchers = pytest.importorskip("fastrec.kernels.linear_cross_entropy")
in_batch = pytest.importorskip("fastrec.kernels.in_batch_cross_entropy")
attention = pytest.importorskip("fastrec.kernels.jagged_attention")
labels = pytest.importorskip("fastrec.kernels.multilabel_bce")
sampled = pytest.importorskip("fastrec.kernels.sampled_linear_cross_entropy")

OPS = (
    linear_cross_entropy.OP,
    in_batch_cross_entropy.OP,
    sampled_linear_cross_entropy.OP,
    multilabel_bce.OP,
    jagged_attention.OP,
)


CPU = torch.device("cpu")  # stands for sm_90


@pytest.fixture
def ieee():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def values(*shape):
    """float32 of all magnitudes whose products are float32."""
    return torch.randn(*shape) * torch.exp2(torch.randint(-40, 40, shape).float())


def test_two_halves_hold_a_number():
    x = values(1000, 64)
    high, low = wide.halves(x)
    assert high.dtype == low.dtype == torch.bfloat16
    lost = (x.double() - high.double() - low.double()).abs()
    assert (lost <= 2.0**-17 * x.abs()).all()


def test_every_product_keeps_fifteen_bits():
    a, b = values(256, 1), values(1, 256)
    exact = a.double() @ b.double()
    error = ((wide.product(a, b, "bf16x3").double() - exact) / exact).abs().max()
    assert 2.0**-17 < error <= 2.0**-15
    assert ((wide.product(a, b).double() - exact) / exact).abs().max() <= 2.0**-24


def test_who_asks_gets_ieee(ieee):
    assert tiles.float32_products(CPU) == "ieee"
    assert launchers._options(torch.ones(1, 64), torch.ones(1, 64))["fwd"]["PRECISION"] == "ieee"


@pytest.mark.parametrize("capability", [80, 90, 100, 103, 120])
@pytest.mark.parametrize("version", [(3, 6), (3, 8), (3, 9), (4, 0)])
def test_products_that_are_added_to_the_same_are_not_split_by_old_tritons_on_blackwell(
    capability, version, monkeypatch
):
    monkeypatch.setattr(tiles, "capability_of", lambda device: capability)
    monkeypatch.setattr(tiles, "TRITON", version)
    wrong = capability >= 100 and version < (3, 9)
    assert tiles.float32_products(CPU) == ("ieee" if wrong else "bf16x3")


def test_without_a_wish_products_are_split():
    assert tiles.float32_products(CPU) == "bf16x3"
    single, half = torch.ones(1, 64), torch.ones(1, 64, dtype=torch.bfloat16)
    assert launchers._options(single, single)["bwd"]["PRECISION"] == "bf16x3"
    assert launchers._options(half, single)["bwd"]["PRECISION"] != "bf16x3"
    assert in_batch.options_of(single, "bf16x3")["fwd"]["PRECISION"] == "bf16x3"
    assert in_batch.options_of(torch.ones(1, 300), "bf16x3")["fwd"]["PRECISION"] == "ieee"


def products(width: int, dtype=torch.float32) -> dict[str, str]:
    """How the ops of other scores multiply rows, by kernel."""
    x, offsets = torch.ones(2, width, dtype=dtype), torch.tensor([0, 2])
    found = {f"sampled {b}": sampled._shared_config(x, b)["PRECISION"] for b in (False, True)}
    found |= {f"labels {name}": part["PRECISION"] for name, part in labels._options(x).items()}
    for kernel in ("fwd", "bwd"):
        options = attention._launch(kernel, x[:, None], offsets, 50)[1]
        found[f"attention {kernel}"] = options["PRECISION"]
    return found


def test_the_other_ops_follow(ieee):
    assert set(products(64).values()) == {"ieee"}
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    found = products(64)
    assert found.pop("attention bwd") == "ieee"  # tiles of split products spill
    assert set(found.values()) == {"bf16x3"}
    wide = products(256)
    assert wide["sampled True"] == "bf16x3" and wide["labels fwd"] == "ieee"
    assert "bf16x3" not in products(64, torch.bfloat16).values()


@pytest.mark.triton
@pytest.mark.parametrize(
    "op, name",
    [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS for name in op.representative],
)
def test_ieee_has_the_budget_of_float32(op, name, ieee):
    need(op, "triton", "cpu")
    check(op, name, "triton", "cpu", TYPES[0])
