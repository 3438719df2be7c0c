# SPDX-License-Identifier: Apache-2.0
"""What no compiler and no interpreter shows: a form that a GPU's assembler gets wrong, and one that
a NaN leads astray on a GPU alone."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "kernels"
FILES = sorted(KERNELS.rglob("*.py"))
DOT = ("dot", "tl.dot", "_dot", "dot_t")


def calls(node: ast.AST) -> set[str]:
    return {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}


def names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def transposed_products(source: str) -> list[str]:
    """Operands of a product that are a transposed value which was computed from another product:
    ptxas up to 13.0 multiplies by the transposed 16-bit copy of one wrongly on sm_90."""
    functions = [f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef)]
    products = {*DOT, *(f.name for f in functions if calls(f) & set(DOT))}
    found = []
    for function in functions:
        assignments = [n for n in ast.walk(function) if isinstance(n, (ast.Assign, ast.AugAssign))]
        made: set[str] = set()  # names whose values come out of a product
        for _ in assignments:
            for node in assignments:
                if calls(node.value) & products or names(node.value) & made:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    made |= {name for target in targets for name in names(target)}
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in DOT:
                for place, operand in enumerate(call.args[:2]):
                    text = ast.unparse(operand)
                    turned = ast.unparse(call.func) == "dot_t" and place == 1
                    if (turned or "trans(" in text) and (
                        names(operand) & made or calls(operand) & products
                    ):
                        found.append(f"{function.name}: {text}")
    return found


def test_the_reader_finds_the_form():
    head = "def f(x, y):\n a = exp(dot(x, tl.trans(y)))\n b = load(x)\n b = round_to(b, 1)\n"
    assert transposed_products(head + " return dot(tl.trans(b), a)") == []
    assert transposed_products(head + " return dot(tl.trans(a), b)") == ["f: tl.trans(a)"]
    cast = head + " c = 2 * a\n return tl.dot(b, tl.trans(round_to(c, 1)))"
    assert transposed_products(cast) == ["f: tl.trans(round_to(c, 1))"]
    assert transposed_products(head + " return dot_t(a, b, None)") == []
    assert transposed_products(head + " return dot_t(b, a, None)") == ["f: a"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(KERNELS)))
def test_no_product_reads_a_transposed_result(file):
    assert transposed_products(file.read_text()) == []


def maxima_of_nan(source: str) -> list[str]:
    """Positions of a maximum among what may be NaN: on a GPU a NaN takes the place of the largest
    so far and the next number that of the NaN; the interpreter leaves it out."""
    found = []
    for function in [f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef)]:
        assigned = [n for n in ast.walk(function) if isinstance(n, ast.Assign)]
        assigned.sort(key=lambda n: n.lineno)
        for call in [n for n in ast.walk(function) if isinstance(n, ast.Call)]:
            name = ast.unparse(call.func)
            placed = any(k.arg == "return_indices" for k in call.keywords)
            if not placed and name not in ("tl.argmax", "tl.argmin"):
                continue
            x = ast.unparse(call.args[0])
            before = [n for n in assigned if n.lineno < call.lineno]
            last = [ast.unparse(n.value) for n in before if ast.unparse(n.targets[0]) == x][-1:]
            if not any(text.startswith(f"tl.where({x} == {x}, {x}, ") for text in last):
                found.append(f"{function.name}: {name}({x})")
    return found


def test_the_reader_finds_a_maximum_of_nan():
    call = " peak, at = tl.max(s, 1, return_indices=True)\n"
    clean = " s = tl.where(s == s, s, float('-inf'))\n"
    assert maxima_of_nan("def f(s):\n" + call) == ["f: tl.max(s)"]
    assert maxima_of_nan("def f(s):\n" + clean + call) == []
    assert maxima_of_nan("def f(s):\n" + clean + " s = s + 1\n" + call) == ["f: tl.max(s)"]
    assert maxima_of_nan("def f(s):\n return tl.argmax(s, 0)") == ["f: tl.argmax(s)"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(KERNELS)))
def test_no_position_of_a_maximum_depends_on_a_nan(file):
    assert maxima_of_nan(file.read_text()) == []


def launches(source: str) -> list[tuple[str, bool]]:
    """(kernel, whether it is told to multiply and add at once) of every launch."""
    found = []
    for call in [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]:
        if isinstance(call.func, ast.Subscript):
            options = [ast.unparse(k.value) for k in call.keywords if k.arg is None]
            found.append((ast.unparse(call.func.value), "FUSED" in options))
    return [each for each in found if each[0].endswith("kernel")]


def test_every_launch_says_whether_it_multiplies_and_adds_at_once():
    """Of Triton's default, which changes."""
    assert launches("_fwd_kernel[grid](x, **FUSED)\nkernel[(1,)](x, **config)") == [
        ("_fwd_kernel", True), ("kernel", False),
    ]  # fmt: skip
    found = [each for file in FILES for each in launches(file.read_text())]
    assert len(found) > 30 and [name for name, fused in found if not fused] == []
