# SPDX-License-Identifier: Apache-2.0
"""Main loops in lines of SASS, and the tables that are made of them."""

import pytest

aot = pytest.importorskip("aot", reason="no triton")
import aot_tables  # noqa: E402
from sass import main_loop  # noqa: E402

# A loop of .L_1 with a masked tail (.L_2), which waits out of line (.L_4) for a barrier, inside a
# loop over heads; and the padding of the end.
KERNEL = """
_kernel:
 MOV R1, R2
.L_0:
 LDG.E R3, [R4]
 {before}
.L_1:
 HGMMA.64x64x16 R24, gdesc[UR8], R24
 @!P4 BRA `(.L_4)
.L_3:
 MUFU.EX2 R5, R5
 BRA.U UP0, `(.L_2)
 FSEL R5, R5, -INF , P1
 LDG.E R6, [R4]
.L_2:
 BAR.SYNC.DEFER_BLOCKING 0x0
 LDGSTS.E [R7], [R8]
 @P0 BRA `(.L_1)
 {after}
 @P1 BRA `(.L_0)
 @P5 EXIT
 STG.E [R4], R3
 EXIT
.L_4:
 SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [R9]
 @!P4 BRA `(.L_4)
 BRA `(.L_3)
.L_5:
 BRA `(.L_5)
"""


def sass(text: str) -> str:
    """With the addresses that nvdisasm prints."""
    lines = [
        f"        /*{16 * at:04x}*/      {line.strip()} ;" if line.startswith(" ") else line
        for at, line in enumerate(text.splitlines())
    ]
    return "\n".join(lines)


def kernel(before: str = "NOP", after: str = "NOP") -> str:
    return sass(KERNEL.format(before=before, after=after))


def test_the_loop_of_the_products_with_what_lies_out_of_line():
    loop = main_loop(kernel())
    assert loop.length == 12  # of these 2 in the tail, 3 of waiting
    assert loop.shortest == 7
    counted = {name: loop.opcodes[name] for name in ("HGMMA", "MUFU", "LDG", "LDGSTS", "BAR")}
    assert counted == {"HGMMA": 1, "MUFU": 1, "LDG": 1, "LDGSTS": 1, "BAR": 1}
    assert loop.opcodes["SYNCS"] == 1 and not loop.opcodes["STG"]


def test_of_two_loops_the_longer_one():
    second = ".L_6:\n" + "\n".join([" HGMMA R1, R2"] * 20) + "\n @P2 BRA `(.L_6)"
    assert main_loop(kernel(after="NOP\n" + second)).length == 21


def test_a_longer_loop_without_products_is_not_it():
    second = ".L_6:\n" + "\n".join([" FADD R1, R2"] * 20) + "\n @P2 BRA `(.L_6)"
    assert main_loop(kernel(before="NOP\n" + second)).opcodes["HGMMA"] == 1


def test_without_a_loop_the_whole_kernel():
    loop = main_loop(sass("_kernel:\n FADD R1, R2\n @P0 EXIT\n FADD R1, R3\n EXIT\n"))
    assert (loop.length, loop.shortest, loop.opcodes["FADD"]) == (4, 4, 2)


def binary(code: str = "", **changes) -> "aot.Binary":
    given = dict(registers=128, stack=0, shared=56 * 1024, columns=0, warps=4, elements=128)
    made = aot.Binary(capability=90, wgmma=True, cubin=b"", **given | changes)
    vars(made)["sass"] = code or kernel()  # what nvdisasm would say
    return made


@pytest.mark.parametrize(
    "blocks, changes",
    [
        (4, {}),  # of 65,536 registers, 128 threads of 128 each
        (2, {"registers": 252}),  # 8 warps of 8,064
        (1, {"registers": 130, "warps": 8}),  # 15 warps of 4,352, in fours
        (3, {"shared": 75 * 1024}),  # of 228 KB, and 1 KB for each block
        (2, {"columns": 256}),  # of 512 of the tensor memory
        (16, {"registers": 16, "shared": 0}),  # of 64 warps
        (32, {"registers": 16, "shared": 0, "warps": 1}),
    ],
)
def test_blocks_of_a_multiprocessor(blocks, changes):
    assert binary(**changes).blocks == blocks


@pytest.fixture
def op(tmp_path, monkeypatch):
    """An op of one case whose page and bounds are in a folder of their own."""
    monkeypatch.setattr(aot_tables, "PAGES", tmp_path)
    monkeypatch.setattr(aot_tables, "BOUNDS", tmp_path / "bounds.csv")
    (tmp_path / "x.md").write_text("# X\n<!-- aot:x -->\n\n<!-- /aot -->\nend\n")
    for cached in (aot_tables._page, aot_tables.bounds):
        cached.cache_clear()
    yield aot.Op("x", "kernel sm", [aot.case("fwd", 90, plain=True)], lambda *values: binary())
    for cached in (aot_tables._page, aot_tables.bounds):
        cached.cache_clear()


def test_tables_keep_the_rows_of_other_versions(op, monkeypatch):
    versions = ("3.6.0", "3.10.0", "3.9.0", "3.9.0")
    for version in versions:
        monkeypatch.setattr(aot_tables.triton, "__version__", version)
        aot_tables.write(op)
    text = aot_tables._path(op).read_text()
    assert text.startswith("# X\n<!-- aot:x -->\n\n| kernel | sm | Triton |")
    assert text.endswith("|\n\n<!-- /aot -->\nend\n")
    assert [key[-1] for key in aot_tables.rows_of(op)] == ["3.10.0", "3.9.0", "3.6.0"]
    row = "| fwd | 90 | 3.9.0 | 128 | 0 | 56.0 | 4 | HGMMA | 1 | 1 | 1.00 | 12.0 | 7.0 |"
    assert row in text


@pytest.mark.parametrize(
    "instruction, message",
    [
        ("BAR.SYNC 0x0", "barriers 2, the bound in aot_bounds.csv is 1"),
        ("LDG.E R3, [R4]", "LDG 2, the bound"),
        ("MUFU.EX2 R3, R4", "MUFU/element 2, the bound"),
        ("FADD R3, R4", "instructions/element 13, the bound in aot_bounds.csv is 12.6"),
    ],
)
def test_what_a_loop_needs_more_is_seen(op, instruction, message):
    aot_tables.write(op)
    aot_tables.write_bounds([op])
    aot_tables.check(op, ("fwd", 90), binary())
    more = kernel().replace(" MUFU.EX2 R5", f" {instruction} ;\n  /*0000*/ MUFU.EX2 R5")
    with pytest.raises(AssertionError, match=message):
        aot_tables.check(op, ("fwd", 90), binary(more))


def test_fewer_blocks_and_stale_pages_are_seen(op):
    aot_tables.write(op)
    aot_tables.write_bounds([op])
    with pytest.raises(AssertionError, match="blocks per SM 2, the bound"):
        aot_tables.check(op, ("fwd", 90), binary(registers=252))
    with pytest.raises(AssertionError, match=r"x\.md is stale: run `make kernel-tables`"):
        aot_tables.check(op, ("fwd", 90), binary(registers=120))
    with pytest.raises(AssertionError, match=r"has no row for x fwd 80"):
        aot_tables.check(op, ("fwd", 80), binary())
