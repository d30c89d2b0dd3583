import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.errors import RecipeError
from edgeattn.quant.methods import formats

W = torch.randn(5, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_every_fp8_number_is_kept_and_its_byte_known():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[~every.isnan()]
    assert torch.equal(formats.E4M3.round(every), every) and every.max() == formats.E4M3.largest
    assert torch.equal(formats.e4m3_bytes(every).view(torch.float8_e4m3fn).double(), every)


@given(st.lists(st.floats(-500, 500, width=32), min_size=2, max_size=50))
@settings(deadline=None)
def test_rounding_agrees_with_the_cast_and_is_monotone(values):
    x = torch.tensor(values, dtype=torch.float32)
    rounded = formats.E4M3.round(x)
    assert torch.equal(rounded, x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert (formats.E4M3.round(x.sort().values).diff() >= 0).all()
    assert (formats.E2M1.round(x.sort().values).diff() >= 0).all()


def test_fp4_agrees_with_ml_dtypes():
    import ml_dtypes  # comes with onnx

    x = torch.cat([W.flatten(), torch.arange(-24, 25, dtype=torch.float64) / 4]).clamp(-6, 6)
    want = x.numpy().astype(ml_dtypes.float4_e2m1fn)
    rounded = formats.E2M1.round(x)
    assert np.array_equal(rounded.numpy(), want.astype(np.float64))
    assert np.array_equal(formats.e2m1_codes(rounded).numpy(), want.view(np.uint8))


@pytest.mark.parametrize("element", [formats.E4M3, formats.E2M1], ids=lambda e: e.name)
def test_mx_scale_is_a_power_of_two(element):
    x = torch.cat([W, torch.zeros(1, 96, dtype=torch.float64)])
    blocks = formats.mx_quantize(x, element)
    assert torch.equal(torch.exp2(blocks.block_scale.log2().round()), blocks.block_scale)
    off = (blocks.dequantize() - x).reshape(6, 3, 32).abs().amax(-1)
    clipped = 2.0 ** (element.top_exponent + 1) - element.largest  # a block's largest may lie just below the next power
    assert (off <= clipped * blocks.block_scale.squeeze(-1)).all()
    assert (blocks.dequantize()[-1] == 0).all()


def test_nvfp4_survives_blocks_of_zeros():
    x = W.clone()
    x[0, :16] = 0
    y = formats.nvfp4_quantize(x).dequantize()
    assert (y[0, :16] == 0).all() and torch.isfinite(y).all()
    assert (formats.nvfp4_quantize(torch.zeros(2, 32)).dequantize() == 0).all()
    assert (y - x).square().mean() < 0.02


@given(rows=st.integers(1, 4), blocks=st.integers(1, 4), block=st.sampled_from([2, 16, 32]), seed=st.integers(0, 9))
@settings(deadline=None)
def test_packing_round_trip(rows, blocks, block, seed):
    codes = torch.randint(0, 16, (rows, blocks * block), generator=torch.Generator().manual_seed(seed))
    packed = formats.pack_nibbles(codes.double(), block)
    assert packed.shape == (rows, blocks, block // 2) and packed.dtype == torch.uint8
    assert torch.equal(formats.unpack_nibbles(packed), codes.to(torch.uint8))
    assert packed[0, 0, 0] == codes[0, 0] + 16 * codes[0, 1]


def test_zero_points_of_an_odd_number_of_blocks():
    assert formats.pack_zero_points(torch.tensor([[1, 2, 3]])).tolist() == [[0x21, 0x03]]


def test_matmulnbits_reads_the_layout():
    import onnxruntime
    from onnx import TensorProto, helper

    block, rows, inputs = 16, 5, 48
    w = W[:, :inputs].float()
    codes, scale, zero = formats.int4_quantize(w, block, symmetric=False)
    tensors = {
        "b": (TensorProto.UINT8, formats.pack_nibbles(codes, block)),
        "s": (TensorProto.FLOAT, scale.flatten()),
        "z": (TensorProto.UINT8, formats.pack_zero_points(zero).flatten()),
    }
    graph = helper.make_graph(
        [
            helper.make_node(
                "MatMulNBits",
                ["x", *tensors],
                ["y"],
                K=inputs,
                N=rows,
                bits=4,
                block_size=block,
                domain="com.microsoft",
            )
        ],
        "packed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, rows])],
        [helper.make_tensor(n, t, v.shape, v.numpy().tobytes(), raw=True) for n, (t, v) in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(1))
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    wq = (codes - zero.repeat_interleave(block, 1)) * scale.repeat_interleave(block, 1)
    torch.testing.assert_close(torch.from_numpy(y), x @ wq.T, rtol=1e-4, atol=1e-4)


def test_errors():
    with pytest.raises(RecipeError, match="block of 20 does not divide"):
        formats.nvfp4_quantize(W, 20)
    with pytest.raises(RecipeError, match="group_size 40 does not divide"):
        formats.int4_quantize(W, 40, symmetric=True)
    with pytest.raises(RecipeError, match="expected an even one"):
        formats.pack_nibbles(torch.zeros(1, 3), 3)
    with pytest.raises(RecipeError, match="codes from -8 to 0: expected 0 to 15"):
        formats.pack_nibbles(torch.tensor([[-8, 0]]), 2)
