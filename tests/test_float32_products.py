# SPDX-License-Identifier: Apache-2.0
"""float32 on a GPU: products of two bfloat16 each unless "ieee" is asked for."""

import pytest
import torch
from op_check import check, need
from op_db import in_batch_cross_entropy, linear_cross_entropy
from op_db.case import TYPES

tiles = pytest.importorskip("fastrec.kernels.common.tiles")
wide = pytest.importorskip("fastrec.kernels.common.linear_cross_entropy_wide")
launchers = pytest.importorskip("fastrec.kernels.linear_cross_entropy")
in_batch = pytest.importorskip("fastrec.kernels.in_batch_cross_entropy")


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
    assert tiles.float32_products() == "ieee"
    assert launchers._options(torch.ones(1, 64), torch.ones(1, 64))["fwd"]["PRECISION"] == "ieee"


def test_without_a_wish_products_are_split():
    assert tiles.float32_products() == "bf16x3"
    single, half = torch.ones(1, 64), torch.ones(1, 64, dtype=torch.bfloat16)
    assert launchers._options(single, single)["bwd"]["PRECISION"] == "bf16x3"
    assert launchers._options(half, single)["bwd"]["PRECISION"] != "bf16x3"
    assert in_batch.options_of(single, "bf16x3")["fwd"]["PRECISION"] == "bf16x3"
    assert in_batch.options_of(torch.ones(1, 300), "bf16x3")["fwd"]["PRECISION"] == "ieee"


@pytest.mark.parametrize(
    "op, name",
    [
        pytest.param(op, name, id=f"{op.name}-{name}")
        for op in (linear_cross_entropy.OP, in_batch_cross_entropy.OP)
        for name in op.representative
    ],
)
def test_ieee_has_the_budget_of_float32(op, name, ieee):
    need(op, "triton", "cpu")
    check(op, name, "triton", "cpu", TYPES[0])
