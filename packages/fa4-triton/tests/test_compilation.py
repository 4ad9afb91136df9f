"""What is read off machine code and notebooks is what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from compilation import Compilation, Loop, Table, operand_hazards, product_loops

PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0 ;"
OTHER = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;"
UNFINISHED = PRODUCT.replace(", gsb0", "")  # the group goes on
WAIT_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
WAIT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"
WAIT_TWO = "WARPGROUP.DEPBAR.LE gsb0, 0x2 ;"


@pytest.mark.parametrize(
    ("code", "operands", "hazards"),
    [
        ([PRODUCT, "MOV R91, R3 ;", WAIT_ALL], 1, 1),
        ([PRODUCT, "@!P0 IMAD.WIDE R90, R3, R4, R6 ;", WAIT_ALL], 1, 1),
        ([PRODUCT, "STS [R88], R3 ;", "MOV R92, R3 ;", WAIT_ALL], 1, 0),
        ([PRODUCT, WAIT_ALL, "MOV R91, R3 ;"], 1, 0),
        ([OTHER, "MOV R88, R3 ;"], 0, 0),
        ([PRODUCT, WAIT_ONE, "LDS.128 R88, [R4] ;", WAIT_ALL], 1, 1),
        ([PRODUCT, OTHER, WAIT_ONE, "MOV R91, R3 ;"], 1, 0),
        ([OTHER, PRODUCT, WAIT_ONE, "LDS.128 R88, [R4] ;"], 1, 1),
        ([UNFINISHED, OTHER, WAIT_ONE, "MOV R88, R3 ;"], 1, 1),
        ([PRODUCT, WAIT_TWO, "MOV R91, R3 ;"], 1, 1),
    ],
)
def test_an_operand_of_a_product_under_way_that_is_overwritten_is_found(
    code: list[str], operands: int, hazards: int
) -> None:
    lines = [f"        /*{16 * at:04x}*/                   {text}" for at, text in enumerate(code)]
    found, overwriting = operand_hazards(lines)
    assert (found, len(overwriting)) == (operands, hazards)


def test_spills_in_a_loop_are_found() -> None:
    body = (PRODUCT, WAIT_ONE, "LDL R3, [R1+0x8] ;", "@P0 BRA `(.L_x_1) ;")
    code = [".L_x_1:", *(f"        /*{at:04x}*/    {text}" for at, text in enumerate(body))]
    (loop,) = product_loops(code)
    assert loop == Loop(("PRODUCT", "WAIT 1"), local=1, length=4)


def test_a_table_is_what_lies_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- costs:begin -->\nold\n<!-- costs:end -->\nafter\n")
    table = Table(page, "costs")
    assert table.told() == "old"
    table.write("new")
    assert page.read_text() == "before\n<!-- costs:begin -->\nnew\n<!-- costs:end -->\nafter\n"


@pytest.mark.parametrize("text", ["", "<!-- costs:end --><!-- costs:begin -->"])
def test_a_notebook_without_the_markers_is_an_error(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="must have the line <!-- costs:begin -->"):
        Table(page, "costs").told()


def test_what_is_not_compiled_is_an_error_that_says_why() -> None:
    compilation = Compilation(["no_such_module"])
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        compilation.records("no_such_module")
    compilation.stop()
