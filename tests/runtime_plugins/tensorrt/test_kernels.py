"""Every op through its GPU kernels in Triton's interpreter, against the float64 reference."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'edgeattn[kernels]'")

from edgeattn.errors import MissingDependency, UnsupportedOp
from edgeattn.runtime_plugins import tensorrt
from edgeattn.runtime_plugins.tensorrt import launch
from edgeattn.runtime_plugins.tensorrt.programs import build_program
from tests.runtime_plugins.tensorrt.gpu_cases import OPS, SLOW, assert_close, cases_of, inputs_of, reference_of

# Share of the reference's spread. bfloat16 has 8 bits, of which the interpreter cuts one more by not rounding.
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2.5e-2}
EVERY = [
    pytest.param(op, case, marks=pytest.mark.slow if (op.removeprefix("Q"), case) in SLOW else (), id=f"{op}-{case}")
    for op in OPS for case in cases_of(op)
]  # fmt: skip


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("op, case", EVERY)
def test_equals_reference(op, case, dtype):
    tensors, attributes = inputs_of(op, case, dtype)
    found = launch.run_op(op, tensors, attributes)
    assert_close(found, reference_of(op, tensors, attributes), LIMITS[dtype], dtype)


def test_linear_attention_sums_in_float32():
    """4096 tokens of 100: the plain sum of k v would pass 65504, the largest float16."""
    qk, v = torch.full((1, 8, 64, 64), 10.0).half(), torch.full((1, 4, 64, 64), 100.0).half()
    found = launch.run_op("EluLinearAttention", [qk, v], {"num_heads": 1, "epsilon": 1e-6})
    np.testing.assert_allclose(found.float().numpy(), 100, rtol=2e-3)


def test_extreme_logits_stay_finite():
    tensors, attributes = inputs_of("HiLoAttention", "one-window", torch.float16)
    tensors = [x * 100 for x in tensors]
    found = launch.run_op("HiLoAttention", tensors, attributes)
    assert_close(found, reference_of("HiLoAttention", tensors, attributes), 1e-3, torch.float16)


@pytest.mark.parametrize("op", [name for name in OPS if name[0] != "Q"])
def test_nan_stays_in_its_picture(op):
    tensors, attributes = inputs_of(op, "batch", torch.float32)
    clean = launch.run_op(op, tensors, attributes)
    tensors[0].view(3, -1)[1] = torch.nan
    found = launch.run_op(op, tensors, attributes)
    part = found[1] if op != "HiLoAttention" else found[1, :, found.shape[2] // 2 :]  # the heads that read lo_q
    assert part.isnan().all()
    assert torch.equal(found[0], clean[0]) and torch.equal(found[2], clean[2])


@pytest.mark.parametrize("op", [name for name in OPS if name[0] != "Q"])
def test_writes_all_of_the_result_and_nothing_else(op, monkeypatch):
    """The result is filled with NaN beforehand and has a guard behind it, so are the workspaces."""
    guards = []

    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def guard(whole, fill, size):
        whole.fill_(fill)
        guards.append(whole[math.prod(size) :])
        return whole[: math.prod(size)].view(size)

    def new_output(self, size, **other):
        if other:  # Triton's own
            return new_empty(self, size, **other)
        return guard(empty(math.prod(size) + 64, dtype=self.dtype), torch.nan, size)

    def new_workspace(count, **other):
        return guard(empty(count + 64, **other), 255, (count,))

    tensors, attributes = inputs_of(op, cases_of(op)[-1], torch.float32)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_output)
    monkeypatch.setattr(torch, "empty", new_workspace)
    found = launch.run_op(op, tensors, attributes)
    assert found.isfinite().all()
    assert guards and all((rest.isnan() if rest.is_floating_point() else rest == 255).all() for rest in guards)


def test_empty_batch():
    tensors, attributes = inputs_of("SingleHeadAttention", "batch", torch.float32)
    tensors[0] = tensors[0][:0]
    assert launch.run_op("SingleHeadAttention", tensors, attributes).shape == (0, 68, 4, 4)


def test_one_program_serves_all_batches_and_sizes():
    tensors, attributes = inputs_of("SingleHeadAttention", "batch", torch.float32)
    program = build_program("SingleHeadAttention", [x.shape for x in tensors], attributes, "float32")
    tensors[0] = torch.randn(2, 68, 7, 3)
    want = reference_of("SingleHeadAttention", tensors, attributes)
    assert_close(launch.run(program, tensors), want, 1e-6, torch.float32)


def test_other_shapes_and_views_are_refused():
    tensors, attributes = inputs_of("SingleHeadAttention", "batch", torch.float32)
    program = build_program("SingleHeadAttention", [x.shape for x in tensors], attributes, "float32")
    with pytest.raises(UnsupportedOp, match=r"inputs have shapes .*\(3, 67, 4, 4\).* this program is for"):
        launch.run(program, [tensors[0][:, 1:], *tensors[1:]])
    with pytest.raises(
        UnsupportedOp, match=r"input 0 .* is not contiguous, or does not start at a multiple of 16 bytes"
    ):
        launch.run(program, [tensors[0].transpose(2, 3), *tensors[1:]])


def test_what_has_no_kernels_is_refused():
    with pytest.raises(UnsupportedOp, match="no GPU kernels for op 'Softmax'; there are some for CascadedGroup"):
        build_program("Softmax", [], {}, "float32")
    tensors, attributes = inputs_of("HiLoAttention", "batch", torch.float32)
    shapes = [x.shape for x in tensors]
    with pytest.raises(UnsupportedOp, match="no GPU kernels for float64; expected one of float16, bfloat16, float32"):
        build_program("HiLoAttention", shapes, attributes, "float64")
    attributes = {"num_heads": 1, "key_dim": 16, "window": [9, 8], "scale": 0.25}
    wide = [(1, 16, 9, 8), (48, 16, 1, 1), (48,), (16, 1, 3, 3), (16,), (1, 72, 72), (16, 16, 1, 1), (16,)]
    with pytest.raises(UnsupportedOp, match=r"a window of 9x8 tokens; .* at most 64 tokens"):
        build_program("CascadedGroupAttention", wide, attributes, "float16")


def test_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: None)
    tensors, attributes = inputs_of("SingleHeadAttention", "batch", torch.float32)
    with pytest.raises(MissingDependency, match=r"pip install 'edgeattn\[kernels\]'"):
        launch.run_op("SingleHeadAttention", tensors, attributes)


def test_import_needs_no_triton():
    script = "import sys, edgeattn.runtime_plugins.tensorrt.launch, edgeattn.runtime_plugins.tensorrt.aot; " \
        "print('triton' in sys.modules, 'torch' in sys.modules)"  # fmt: skip
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "False"]


def test_variant_id_says_everything():
    tensors, attributes = inputs_of("SingleHeadAttention", "batch", torch.float32)
    variant = (
        build_program("SingleHeadAttention", [x.shape for x in tensors], attributes, "float32").launches[0].variant
    )
    assert variant.id != dataclasses.replace(variant, num_warps=8).id
    assert variant.id.startswith("single_head_attention_f32_")
