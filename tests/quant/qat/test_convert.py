import json

import pytest
import torch

from edgeattn import create_model
from edgeattn.data.interface import interface_of
from edgeattn.errors import RecipeError
from edgeattn.export.onnx_model import to_onnx
from edgeattn.quant.graph import capture
from edgeattn.quant.qat.convert import export_grids, freeze, prepare, quantized_weights, quantizer_parameters
from edgeattn.quant.qat.lsq import LsqQuantizer
from edgeattn.quant.qat.settings import PRESETS, preset
from tests.quant.qat.conftest import TINY


@pytest.mark.parametrize("model", ["deit_tiny", "deit_tiny_distilled"])
@pytest.mark.parametrize(
    "name", [*PRESETS, "ofq-w2a2-statsq", "ofq-w2a2-shifts", "lsq-w2a2+qkr", "lsq-w2a2+statsq", "lsq-w2a2+fine"]
)
def test_every_preset_learns_everywhere_and_freezes_to_the_same_numbers(tiny, name, model):
    made, x = tiny(name, model).train(), torch.randn(3, 3, 16, 16)
    logits = made(x)
    sum(part.square().sum() for part in (logits if isinstance(logits, tuple) else (logits,))).backward()
    assert [key for key, value in made.named_parameters() if value.grad is None] == []
    frozen = freeze(made.eval())
    with torch.no_grad():
        assert torch.equal(frozen(x), made(x))
    assert not any(isinstance(module, LsqQuantizer) for module in frozen.modules())
    assert (
        f"{name}: weights and activations lie on the trained grids, and the artefact computes in float32"
        in (frozen.notes[-1])
    )


def test_where_the_quantizers_are(tiny):
    made = tiny("ofq-w2a2", "deit_tiny_distilled")
    names = set(quantized_weights(made, edges=True))
    block = {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.product", "attn.value", "attn.proj")}
    mlp = {f"blocks.{i}.mlp.{part}" for i in (0, 1) for part in ("fc1", "fc2")}
    assert names == block | mlp | {"patch_embed.proj", "head", "head_dist"}
    assert set(quantized_weights(made)) == block | mlp
    attention, tokens = made.blocks[0].attn, 2 + 4
    assert attention.x_quantizer.scale.shape == (1, tokens, 1)
    assert attention.t_quantizer.scale.shape == (1, tokens, 2, 1) and attention.t_quantizer.before.shape == (2, 16)
    assert attention.v_quantizer.scale.shape == (1, 1, 16)
    assert attention.softmax_quantizer.limits == made.blocks[0].mlp.fc2.input_quantizer.limits == (0, 3)
    assert made.head.input_quantizer.bits == made.patch_embed.proj.weight_quantizer.bits == 8
    assert made.notes == [
        "QKR keeps 512 numbers per block where query and key weights are 512; its scores cost 2 times as much"
    ]
    block = tiny("lsq-w3a3").blocks[0]
    assert block.attn.q_quantizer.scale.shape == block.attn.v_quantizer.scale.shape == (1, 1, 1)
    assert block.mlp.fc1.weight_quantizer.scale.shape == (1, 1)
    plain = tiny("lsq-w3a3+fine").blocks[0].attn
    assert plain.q_quantizer.scale.shape == (1, 5, 1) and plain.v_quantizer.scale.shape == (1, 1, 16)
    assert len(quantizer_parameters(made)) == sum(
        key.endswith(("scale", "before", "after")) for key in made.state_dict()
    )


@pytest.mark.parametrize("name", ["ofq-w2a2", "ofq-w4a4", "lsq-w3a3", "lsq-w3a3+fine"])
def test_grids_hold_what_the_model_computes_with(tiny, name):
    made = tiny(name)
    grids = export_grids(made)
    for key, module in quantized_weights(made, edges=True).items():
        codes, scale, zero_point = grids[key]
        with torch.no_grad():
            want = module.weight_quantizer(module.source())
        assert torch.allclose((codes.float() - zero_point) * scale, want, rtol=1e-5), key


def test_frozen_model_is_standard_onnx(tiny):
    made = freeze(tiny("ofq-w2a2"))
    interface = interface_of(made)
    model = to_onnx(capture(made, interface), interface)
    kinds = {node.op_type for node in model.graph.node}
    assert {"Div", "Round", "Clip", "Mul"} <= kinds and not model.functions
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        want = made(x)
    got = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
    # A value on a rounding tie may fall to either side, so single pictures may differ, the middle one may not.
    assert (got - want).abs().amax(1).median() < 1e-4


def test_refusals(tiny):
    with torch.device("meta"):
        others = {name: create_model(name) for name in ("shvit_s1", "vggt", "efficientvit_m0")}
    for name, model in others.items():
        with pytest.raises(RecipeError, match=rf"^{name} is a .*(Attention|SHSA) have .*QAT takes DeiT \(deit_tiny"):
            prepare(model, preset("ofq-w2a2"))
    with pytest.raises(RecipeError, match="has quantizers already; start from the float model"):
        prepare(tiny("lsq-w2a2"), preset("ofq-w2a2"))
    with pytest.raises(RecipeError, match="has no quantizers to freeze"):
        freeze(tiny())
    with pytest.raises(RecipeError, match="scale was never set"):
        freeze(prepare(create_model("deit_tiny", **TINY), preset("ofq-w2a2")))


def test_settings_are_plain_data(tiny):
    assert json.loads(json.dumps(tiny("ofq-w2a2").quantization.to_dict()))["name"] == "ofq-w2a2"
