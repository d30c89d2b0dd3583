"""Size expressions, shape patterns and the plain-data form of programs."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.errors import UnsupportedOp
from edgeattn.runtime_plugins.tensorrt.program import Program, evaluate, product
from edgeattn.runtime_plugins.tensorrt.programs import tile
from edgeattn.runtime_plugins.tensorrt.zoo import zoo_programs


@pytest.mark.parametrize(
    "expression, value",
    [
        (7, 7), ("B", 3), (("add", "B", 2), 5), (["mul", "B", "N"], 300), (("cdiv", ("mul", "B", "N"), 64), 5),
        (("min", "N", 4), 4), (("cdiv", 128, 64), 2),
    ],
)  # fmt: skip
def test_expression(expression, value):
    assert evaluate(expression, {"B": 3, "N": 100}) == value


def test_wrong_expressions_are_named():
    with pytest.raises(UnsupportedOp, match="size 'H' has no value"):
        evaluate(("mul", "B", "H"), {"B": 1})
    with pytest.raises(UnsupportedOp, match="operator 'sub' is not one of add, mul, min, cdiv"):
        evaluate(("sub", "B", 1), {"B": 1})


@given(st.lists(st.one_of(st.integers(1, 9), st.sampled_from(["B", "H"]), st.just(("cdiv", "H", 2))), max_size=6))
def test_product_is_the_product(factors):
    symbols, expected = {"B": 3, "H": 5}, 1
    for factor in factors:
        expected *= evaluate(factor, symbols)
    assert evaluate(product(*factors), symbols) == expected


@pytest.mark.parametrize("size, expected", [(1, 16), (16, 16), (17, 32), (66, 128)])
def test_tile(size, expected):
    assert tile(size) == expected


@pytest.mark.parametrize("shapes", [[(2, 3), (3,)], [(2, 4), (2, 4), (1,)], [(2, 4)], [(2, 4), (3, 1)]])
def test_shapes_that_do_not_fit_are_refused(shapes):
    program = Program("Op", "float32", (("B", 4), ("B", "N")), {}, (), ())
    assert program.bind([(2, 4), (2, 9)]) == {"B": 2, "N": 9}
    with pytest.raises(UnsupportedOp, match="Op: inputs have shapes"):
        program.bind(shapes)


def test_to_dict_is_plain_data():
    for program in zoo_programs(["efficientvit_m0"], ["float16"]):
        plain = json.loads(json.dumps(program.to_dict()))
        assert [launch["variant"] for launch in plain["launches"]] == [s.variant.id for s in program.launches]
        for launch, source in zip(plain["launches"], program.launches, strict=True):
            assert len(launch["arguments"]) == len(source.variant.signature)
