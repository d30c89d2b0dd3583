"""The table of calls is what the models call; `python -m tests.runtime_plugins.tensorrt.test_zoo` writes it."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edgeattn.errors import UsageError
from edgeattn.models.catalog import CATALOG
from edgeattn.models.folding import fuse_attention
from edgeattn.models.registry import build
from edgeattn.ops.registry import load_ops
from edgeattn.runtime_plugins.tensorrt.program import evaluate
from edgeattn.runtime_plugins.tensorrt.zoo import ZOO_FILE, zoo_calls, zoo_programs

FAMILIES = {"EfficientViT", "SHViT", "CARE", "LITv2"}
BY_TORCH_OP = {spec.torch_op: spec for spec in load_ops().values()}


class Recorder(TorchDispatchMode):
    """Collects the calls of our ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        spec = BY_TORCH_OP.get(function._schema.name)
        if spec:
            tensors, rest = args[: len(spec.inputs)], args[len(spec.inputs) :]
            attributes = dict(zip(spec.attributes, rest, strict=True))
            call = {"op": spec.name, "shapes": [list(t.shape) for t in tensors], "attributes": attributes}
            if call not in self.calls:
                self.calls.append(call)
        return function(*args, **(kwargs or {}))


def collect(name, size):
    """The calls of one picture through the fused model; on the meta device, where nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        model = fuse_attention(build(name, img_size=size).eval())
        with Recorder() as recorder:
            model(torch.empty(1, 3, *size))
    return recorder.calls


@pytest.mark.parametrize("name", [entry.name for entry in CATALOG.values() if entry.family in FAMILIES])
def test_table_is_current(name):
    entry = CATALOG[name]
    assert zoo_calls()[name] == json.loads(json.dumps(collect(name, entry.input_size)))


def test_table_has_every_model_with_an_op():
    assert set(zoo_calls()) == {entry.name for entry in CATALOG.values() if entry.family in FAMILIES}


def test_programs_are_distinct_and_cover_every_op():
    programs = zoo_programs()
    assert {program.op for program in programs} == set(load_ops())
    variants = {launch.variant.id for program in programs for launch in program.launches}
    assert len(variants) == 33 and len(programs) == len({repr(program) for program in programs})


def test_any_batch_fits_and_other_sizes_where_the_op_allows():
    (program,) = zoo_programs(["care_s0"], ["float16"])[:1]
    symbols = program.bind([(5, 64, 20, 10), (5, 32, 20, 10)])
    assert symbols == {"B": 5, "H": 20, "W": 10}
    assert [evaluate(size, symbols) for size in program.launches[0].grid] == [4, 2, 5]


def test_unknown_model_is_refused():
    with pytest.raises(UsageError, match=r"no attention op of edgeattn in deit_tiny; there is one in .*shvit_s1"):
        zoo_programs(["deit_tiny"])


if __name__ == "__main__":
    table = {e.name: collect(e.name, e.input_size) for e in CATALOG.values() if e.family in FAMILIES}
    lines = (
        f'"{name}": [\n ' + ",\n ".join(json.dumps(call) for call in calls) + "\n]" for name, calls in table.items()
    )
    ZOO_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
