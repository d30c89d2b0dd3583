"""What holds for every family: sizes, heads, exports. Tiny configurations, under a second each to run."""

import numpy as np
import pytest
import torch

import edgeattn
from edgeattn import create_model
from edgeattn.data.interface import classifier_interface, interface_of
from edgeattn.errors import CheckpointError, UsageError
from edgeattn.export.onnx_model import to_onnx
from edgeattn.models.folding import fuse_attention
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import aten, calls, capture
from tests.conftest import TINY, randomize

SHVIT = dict(embed_dim=(32, 44, 64), depth=(1, 1, 2), partial_dim=(8, 11, 17), qk_dim=(8, 8, 8))
CARE = dict(
    depths=(1, 1, 2, 2), feat_dims=(12, 24, 48, 96), mem_dims=(4, 8, 16, 32), att_head_dim=(1, 1, 8, 16)
)  # fmt: skip
LITV2 = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
DEIT = dict(embed_dim=24, depth=2, num_heads=3)
FAMILIES = {
    "efficientvit_m0": (TINY, [64, (64, 96)]), "shvit_s1": (SHVIT, [65, (48, 100)]), "care_s0": (CARE, [64, (64, 107)]),
    "litv2_s": (LITV2, [64, (64, 96)]), "deit_tiny": (DEIT, [64, (48, 80)]),
    "deit_tiny_distilled": (DEIT, [64, (80, 32)]),
}  # fmt: skip
DIT = dict(hidden_size=24, depth=2, num_heads=3, num_classes=10)


def tiny(name, **config):
    torch.manual_seed(0)
    model = randomize(create_model(name, num_classes=7, **{**FAMILIES[name][0], **config}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("gamma", "pos_embed", "cls_token", "dist_token")) or "conv_offset" in key:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def graph_of(model, interface=None):
    interface = interface or interface_of(model)
    graph = capture(fuse_attention(model), interface)
    fold(graph)
    return graph, interface


def run_onnx(model, feeds):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


SIZED = [(name, size) for name, (_, sizes) in FAMILIES.items() for size in sizes]


@pytest.mark.parametrize("name, size", SIZED, ids=str)
def test_fused_and_folded_keeps_the_function(name, size):
    model = tiny(name, img_size=size)
    graph, _ = graph_of(model)
    x = torch.randn(3, 3, *model.preprocessing.size)
    with torch.no_grad():
        want, got = model(x), graph(x)
    assert got.shape == (3, 7) and (want - got).abs().max() < 1e-4 * want.std()
    assert not calls(graph, aten.batch_norm.default), "every BatchNorm folds"


@pytest.mark.parametrize("name", FAMILIES)
def test_export_equals_torch_and_has_no_dead_node(name):
    model = tiny(name, img_size=FAMILIES[name][1][1])
    exported = to_onnx(*graph_of(model))
    used = {i for node in exported.graph.node for i in node.input} | {o.name for o in exported.graph.output}
    assert not [node.name for node in exported.graph.node if not used & set(node.output)]
    assert {t.name for t in exported.graph.initializer} <= used
    for batch in (1, 5):
        x = torch.randn(batch, 3, *model.preprocessing.size)
        with torch.no_grad():
            want = model(x).numpy()
        np.testing.assert_allclose(run_onnx(exported, {"image": x.numpy()})[0], want, atol=1e-4 * want.std())


@pytest.mark.slow
@pytest.mark.parametrize("name, opset", [("deit_tiny", 23), ("litv2_s", 23), ("care_s0", 21), ("efficientvit_m0", 21)])
def test_standard_attention_decides_the_opset(name, opset):
    exported = to_onnx(*graph_of(tiny(name, img_size=64)))
    assert {entry.domain: entry.version for entry in exported.opset_import}[""] == opset
    assert any(node.op_type == "Attention" for node in exported.graph.node) == (opset == 23)
    assert all(f.opset_import[0].version == opset for f in exported.functions)


def test_older_opset_has_no_attention_node_and_the_same_values():
    model = tiny("deit_tiny", img_size=64)
    exported = to_onnx(*graph_of(model), opset=21)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x).numpy()
    assert not any(node.op_type == "Attention" for node in exported.graph.node)
    np.testing.assert_allclose(run_onnx(exported, {"image": x.numpy()})[0], want, atol=1e-4 * want.std())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shvit_s1", "care_s0"])
def test_free_size(name):
    model = tiny(name)
    exported = to_onnx(*graph_of(model, classifier_interface(("height", "width"))))
    for size in ((64, 96), (128, 64), (224, 256)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            want = model(x).numpy()
        np.testing.assert_allclose(run_onnx(exported, {"image": x.numpy()})[0], want, atol=1e-4 * want.std())


def test_free_size_of_a_model_with_tables_is_refused(pictures):
    with pytest.raises(UsageError, match=r"deit_tiny is built for one input size .* Any size: SHViT and CARE"):
        edgeattn.quantize(tiny("deit_tiny", img_size=64), "float32", dynamic_size=True)


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("efficientvit_m0", 100, r"img_size 100x100 does not fit EfficientViT: .* of 16 .* Nearest: 96x96"),
        ("litv2_s", (100, 224), r"img_size 100x224 does not fit LITv2: .* of 32 .* Nearest: 96x224"),
        ("deit_tiny", 7, r"img_size 7x7 does not fit DeiT: .* of 16 .* Nearest: 16x16"),
        ("care_s0", 31, "31x31 is too small for CARE; both sides must be at least 32"),
        ("shvit_s1", (1, 2, 3), r"size \(1, 2, 3\): expected one side in pixels, or \(height, width\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, size, message):
    with pytest.raises(UsageError, match=message):
        create_model(name, img_size=size)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(UsageError, match="image of 64x80: this DeiT was built for 64x64"):
        tiny("deit_tiny", img_size=64)(torch.zeros(1, 3, 64, 80))
    with pytest.raises(UsageError, match="img_size 40x64 does not fit LITv2"):
        tiny("litv2_s", img_size=64)(torch.zeros(1, 3, 40, 64))


@pytest.mark.parametrize("name", FAMILIES)
def test_new_number_of_classes_re_initialises_the_head_and_says_so(name, tmp_path):
    model = tiny(name, img_size=64)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    other = create_model(name, weights=tmp_path / "w.pth", num_classes=3, img_size=64, **FAMILIES[name][0])
    assert other(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert "the checkpoint has 7 classes, the model 3" in " ".join(other.notes)
    same = create_model(name, weights=tmp_path / "w.pth", img_size=64, **FAMILIES[name][0])
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["care_s0", "deit_tiny_distilled"])
def test_two_heads_train_as_a_pair_and_evaluate_as_their_mean(name):
    model = tiny(name, img_size=64)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        mean = model(x)
        for module in model.modules():  # statistics of evaluation, outputs of training
            module.training = module is model
        first, second = model(x)
    assert torch.equal(mean, (first + second) / 2) and not torch.equal(first, second)


def test_position_table_is_resized_with_the_prefix_kept(tmp_path):
    model = tiny("deit_tiny_distilled", img_size=64)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    wide = create_model("deit_tiny_distilled", weights=tmp_path / "w.pth", img_size=(64, 96), **DEIT)
    assert wide.pos_embed.shape == (1, 2 + 4 * 6, 24) and torch.equal(wide.pos_embed[:, :2], model.pos_embed[:, :2])
    assert "position table resized from 4x4 to 4x6 (bicubic)" in " ".join(wide.notes)


def test_normalisation_epsilons():
    """The golden vectors cannot tell them apart."""
    found = {
        name: {type(m).__name__: m.eps for m in model.modules() if hasattr(m, "eps")}
        for name, model in ((n, create_model(n, **c)) for n, c in (
            ("care_s0", CARE), ("litv2_s", LITV2), ("deit_tiny", DEIT), ("dit_s_2", DIT)
        ))
    }  # fmt: skip
    assert found == {
        "care_s0": {"BatchNorm2d": 1e-5, "LayerNorm": 1e-6}, "litv2_s": {"LayerNorm": 1e-5, "BatchNorm2d": 1e-5},
        "deit_tiny": {"LayerNorm": 1e-6}, "dit_s_2": {"LayerNorm": 1e-6},
    }  # fmt: skip


# LITv2's extremes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("alpha, keys", [(0.0, {"h_qkv", "h_proj"}), (1.0, {"l_q", "l_kv", "l_proj"})])
def test_alpha_extremes_use_standard_attention(alpha, keys):
    model = tiny("litv2_s", img_size=64, alpha=alpha)
    assert {name for name, _ in model.layers[2].blocks[0].attn.named_children()} == keys
    exported = to_onnx(*graph_of(model))
    operations = [node.op_type for node in exported.graph.node]
    assert operations.count("Attention") == 3 and "HiLoAttention" not in operations and not exported.functions
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x).numpy()
    np.testing.assert_allclose(run_onnx(exported, {"image": x.numpy()})[0], want, atol=1e-4 * want.std())


def test_configurations_that_contradict_are_refused():
    with pytest.raises(UsageError, match=r"alpha 1.5: expected the share"):
        create_model("litv2_s", alpha=1.5)
    with pytest.raises(UsageError, match="a stage with attention needs a window of at least 1"):
        create_model("litv2_s", local_ws=(0, 0, 0, 1))
    with pytest.raises(UsageError, match="att_head_dim 7 does not divide the 32 channels"):
        create_model("care_s0", att_head_dim=(1, 1, 7, 32))
    with pytest.raises(UsageError, match="cls_dim 7: the last block gives ratio 4 x 256 = 1024"):
        create_model("care_s0", cls_dim=7)
    with pytest.raises(UsageError, match="embed_dim 200 is not a multiple of num_heads 3"):
        create_model("deit_tiny", embed_dim=200)


@pytest.mark.parametrize("grid", [(8, 8), (2, 6)], ids=str)
def test_deformable_convolution_is_onnx_deform_conv(grid):
    """Offsets reach beyond the border; compared with the standard operator in ONNX Runtime."""
    from onnx import TensorProto, helper

    from edgeattn.models.litv2 import DeformableConv

    torch.manual_seed(0)
    layer = DeformableConv(5, 9)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.6)
    x = torch.randn(2, 5, *grid)
    with torch.no_grad():
        want, offset = layer(x).numpy(), layer.conv_offset(x).numpy()
    feeds = {"x": x.numpy(), "w": layer.weight.detach().numpy(), "o": offset, "b": layer.bias.detach().numpy()}
    node = helper.make_node("DeformConv", list(feeds), ["y"], kernel_shape=[2, 2], strides=[2, 2])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in feeds.items()]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    np.testing.assert_allclose(run_onnx(model, feeds)[0], want, atol=1e-5)


# DiT ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("patch, input_size", [(2, 8), (4, 12), (8, 16)])
def test_dit_export(patch, input_size):
    torch.manual_seed(0)
    model = create_model("dit_s_2", patch_size=patch, input_size=input_size, **DIT)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for call, batch in ((model, 1), (model, 3), (model.guided(2.0), 4)):
        feeds = interface_of(call).examples(dict.fromkeys(interface_of(call).free_axes, batch))
        with torch.no_grad():
            want = call(*map(torch.from_numpy, feeds.values())).numpy()
        (got,) = run_onnx(to_onnx(*graph_of(call)), feeds)
        assert want.shape == (batch, 8, input_size, input_size)
        np.testing.assert_allclose(got, want, atol=1e-4 * want.std())


def test_dit_refusals_and_table(tmp_path):
    with pytest.raises(UsageError, match=r"input_size 31 is not a multiple of the patch 2\. Nearest: 32"):
        create_model("dit_s_2", input_size=31)
    small = create_model("dit_s_2", input_size=8, **DIT)
    with pytest.raises(UsageError, match=r"latents of \(1, 4, 10, 10\): .* Build it with input_size=10"):
        small(torch.zeros(1, 4, 10, 10), torch.zeros(1).long(), torch.zeros(1).long())
    with pytest.raises(UsageError, match="forward_with_cfg got a batch of 3"):
        small.forward_with_cfg(torch.zeros(3, 4, 8, 8), torch.zeros(3).long(), torch.zeros(3).long(), 4.0)
    training = {"model": {"nonsense": torch.zeros(1)}, "ema": small.state_dict(), "opt": {}}
    torch.save(training, tmp_path / "w.pt")
    large = create_model("dit_s_2", weights=tmp_path / "w.pt", input_size=12, **DIT)
    assert "fixed table made anew for 36 tokens (checkpoint: 16)" in " ".join(large.notes)


def test_dit_bundle(tmp_path):
    model = create_model("dit_s_8", input_size=16, **DIT)
    bundle = edgeattn.export(model, ["onnxruntime", "openvino"], tmp_path / "b", recipe="float32")
    assert edgeattn.runtime.verify.verify(bundle.path).ok
    assert [e.name for e in bundle.manifest.inputs] == ["x", "t", "y"] and bundle.manifest.task == "other"
    assert bundle.manifest.nodes["float32"]["Attention"] == 2
    with pytest.raises(UsageError, match=r"'dit_s_8', which is not a classifier .* `edgeattn verify`"):
        edgeattn.check(bundle.path, [np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(UsageError, match="this version quantizes classifiers only"):
        edgeattn.export(model, ["onnxruntime"], tmp_path / "q", recipe="w8a8", data=[np.zeros((8, 8, 3), np.uint8)])


def test_distilled_checkpoint_in_a_plain_model_names_the_right_one(tmp_path):
    torch.save({"model": create_model("deit_tiny_distilled").state_dict()}, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match="deit_tiny_distilled"):
        create_model("deit_tiny", weights=tmp_path / "d.pth")
