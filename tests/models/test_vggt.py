import pytest
import torch
from torch.nn import functional as F

import edgeattn
from edgeattn import create_model, list_models
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import UsageError
from edgeattn.models import vggt_heads
from edgeattn.models.vggt import VGGT
from edgeattn.models.vggt_heads import DPTHead, ResidualUnit
from edgeattn.models.vggt_layers import DinoEncoder
from edgeattn.models.vggt_tracker import offset_grid
from edgeattn.runtime.verify import verify

DENSE = dict(features=16, out_channels=(8, 8, 16, 16), intermediate_layer_idx=(0, 0, 1, 1))
TINY = dict(
    aggregator=dict(img_size=56, embed_dim=32, depth=2, num_heads=2, patch_embed="conv", init_values=1.0),
    camera_head=dict(trunk_depth=1, num_heads=4, init_values=1.0),
    point_head=DENSE,
    depth_head=DENSE,
    track_head=dict(
        feature_extractor=DENSE,
        tracker=dict(corr_levels=3, corr_radius=1, hidden_size=16, depth=1, num_virtual_tracks=4, num_heads=2),
        iters=2,
    ),
)
RESULTS = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf", "track", "vis", "conf")
DIAGNOSTICS = ("pose_enc_iter0", "track_delta", "track_delta_iter0")


def changed(part, **settings):
    """TINY with other settings in one part, given as "track_head.tracker" or "aggregator"."""
    name, _, inner = part.partition(".")
    own = {**TINY[name], inner: {**TINY[name][inner], **settings}} if inner else {**TINY[name], **settings}
    return {**TINY, name: own}


def built(config=TINY):
    torch.manual_seed(0)
    return VGGT(**config).eval()


def seen(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


@pytest.fixture(scope="module")
def tiny():
    return built()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.rand(2, 3, 3, 42, 56), torch.rand(2, 5, 2) * 40


def test_1b_has_the_published_parameters():
    with torch.device("meta"):
        model = create_model("vggt_1b")
    assert sum(p.numel() for p in model.parameters()) == 1_256_537_516
    assert list_models("vggt*") == ["vggt", "vggt_1b"]
    assert model.preprocessing == Preprocessing(size=(518, 518), mean=(0.0,) * 3, std=(1.0,) * 3)
    assert [spec.name for spec in model.interface.inputs] == ["images", "query_points"]
    assert model.interface.outputs == RESULTS + DIAGNOSTICS


@pytest.mark.parametrize(
    "config, message",
    [
        (changed("aggregator", patch_embed="dinov2_vitg14_reg"), r"'dinov2_vitg14_reg'.*dinov2_vitl14_reg"),
        (changed("aggregator", patch_embed="dinov2_vits14_reg"), "embed_dim 32 does not fit.*which has 384"),
        (changed("aggregator", patch_embed="dinov2_vits14_reg", embed_dim=384, img_size=500), "Nearest: 504"),
        (changed("aggregator", depht=3), "aggregator: unknown setting 'depht'; it takes img_size,.*depth"),
        (changed("aggregator", aa_block_size=3), "aa_block_size 3 does not divide depth 2"),
        (changed("aggregator", num_heads=3), "3 heads cannot share 32 channels"),
        (changed("aggregator", embed_dim=36), "heads of 18 features cannot be rotated"),
        (changed("camera_head", dim_in=32), "camera_head: dim_in is 32; expected 64"),
        (changed("camera_head", num_iterations=0), "num_iterations is 0"),
        (changed("camera_head", fl_act="gelu"), r"camera_head.fl_act 'gelu'.*relu"),
        (changed("depth_head", activation="log"), r"depth_head.activation 'log'.*inv_log"),
        (changed("point_head", conf_activation="exp"), r"point_head.conf_activation 'exp'.*expp1"),
        (changed("depth_head", activation="xy_inv_log"), "output_dim is 2, expected 4"),
        (changed("point_head", intermediate_layer_idx=(0, 1, 1, 2)), "out of range.*rounds 0 to 1"),
        (changed("point_head", out_channels=(8, 8, 16)), "expected four levels"),
        (changed("point_head", features=20), "features of 8"),
        (changed("depth_head", feature_only=True), "feature_only is for the track head"),
        (changed("track_head", iters=0), "iters is 0"),
        (changed("track_head.tracker", latent_dim=8), "latent_dim 8 channels; its feature_extractor makes 16"),
        (changed("track_head.tracker", num_heads=3), "track_head.tracker: 3 heads"),
        (changed("track_head.feature_extractor", feature_only=False), "feature_only False"),
        ({**TINY, "depth_head": True}, "depth_head is True; expected a dict"),
        ({**TINY, **dict.fromkeys(("camera_head", "depth_head", "point_head", "track_head"))}, "without any head"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(UsageError, match=message):
        VGGT(**config)


def test_inputs_that_do_not_fit_are_refused(tiny, inputs):
    images, query = inputs
    with pytest.raises(UsageError, match=r"100x180.*multiples of 14 .*Nearest: 98x182"):
        tiny(torch.zeros(1, 2, 3, 100, 180))
    with pytest.raises(UsageError, match=r"expected \(batch, views, 3"):
        tiny(torch.zeros(1, 2, 4, 56, 56))
    with pytest.raises(UsageError, match=r"torch\.uint8.*divide 8-bit pixels by 255"):
        tiny(torch.zeros(1, 2, 3, 56, 56, dtype=torch.uint8))
    with pytest.raises(UsageError, match=r"\(1, 5, 2\) for 2 scene"):
        tiny(images, query[:1])
    deep = built(changed("track_head.tracker", corr_levels=6))
    with pytest.raises(UsageError, match=r"42x56 are too small.*6 pyramid levels need sides of at least 70"):
        deep(images, query)
    assert "depth" in seen(deep, images)
    assert "track" in seen(deep, torch.zeros(1, 1, 3, 70, 70), query[:1])


def test_results_and_a_missing_batch(tiny, inputs):
    images, query = inputs
    found = seen(tiny, images, query)
    assert tuple(found) == tiny.output_names() == RESULTS + DIAGNOSTICS
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "pose_enc": (2, 3, 9), "pose_enc_iter0": (2, 3, 9), "depth": (2, 3, 42, 56, 1), "depth_conf": (2, 3, 42, 56),
        "world_points": (2, 3, 42, 56, 3), "world_points_conf": (2, 3, 42, 56), "track": (2, 3, 5, 2),
        "vis": (2, 3, 5), "conf": (2, 3, 5), "track_delta": (2, 2, 5, 2), "track_delta_iter0": (2, 2, 5, 2),
    }  # fmt: skip
    assert torch.equal(found["track"][:, 0], query) and (found["pose_enc"][..., 7:] >= 0).all()
    alone = seen(tiny, images[0], query[0])
    for name, value in found.items():
        assert torch.allclose(alone[name][0], value[0], atol=1e-4), name


def test_without_query_points_nothing_is_tracked(tiny, inputs):
    found = seen(tiny, inputs[0])
    assert tuple(found) == tiny.output_names(tracks=False) == (*RESULTS[:5], "pose_enc_iter0")


def test_heads_left_out(inputs, caplog):
    model = built({**TINY, "camera_head": None, "point_head": None, "track_head": None})
    assert {key.split(".")[0] for key in model.state_dict()} == {"aggregator", "depth_head"}
    assert tuple(seen(model, *inputs)) == ("depth", "depth_conf") and "without a track head" in caplog.text
    assert [spec.name for spec in model.interface.inputs] == ["images"]
    assert tuple(seen(built({**TINY, "depth_head": None, "point_head": None}), inputs[0])) == (
        "pose_enc", "pose_enc_iter0",
    )  # fmt: skip


def test_only_the_first_view_is_special(tiny, inputs):
    images, query = inputs
    found, swapped = seen(tiny, images, query), seen(tiny, images[:, [0, 2, 1]], query)
    for name in RESULTS:
        assert torch.allclose(found[name][:, [0, 2, 1]], swapped[name], atol=1e-4), name
    other_first = seen(tiny, images[:, [1, 0, 2]])
    assert not torch.allclose(found["pose_enc"][:, [1, 0, 2]], other_first["pose_enc"], atol=1e-2)


@pytest.mark.parametrize("size", [(14, 14), (42, 70), (98, 28)], ids=str)
def test_any_multiple_of_the_patch(tiny, size):
    found = seen(tiny, torch.rand(1, 1, 3, *size), torch.rand(1, 2, 2) * 14)
    assert found["depth"].shape == (1, 1, *size, 1) and all(torch.isfinite(v).all() for v in found.values())


@pytest.mark.parametrize("grid", [(5, 5), (3, 8), (11, 4)], ids=str)
def test_position_table_is_resized_as_torch_does_with_antialiasing(grid):
    encoder = DinoEncoder(width=8, depth=1, num_heads=2, patch=14, side=5, num_registers=4)
    torch.nn.init.normal_(encoder.pos_embed)
    table = encoder.pos_embed[:, 1:].unflatten(1, (5, 5)).permute(0, 3, 1, 2)
    want = F.interpolate(table, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.allclose(encoder.position(*grid), want, atol=1e-5)
    assert encoder(torch.rand(2, 3, 14 * grid[0], 14 * grid[1])).shape == (2, grid[0] * grid[1], 8)


def test_rounds_alternate_in_blocks_and_only_the_wanted_are_kept():
    model = built(changed("aggregator", depth=4, aa_block_size=2, qk_norm=False))
    order = []
    for kind in ("frame", "global"):
        for i, block in enumerate(getattr(model.aggregator, f"{kind}_blocks")):
            block.register_forward_hook(lambda _m, _i, out, name=f"{kind}{i}": order.append((name, tuple(out.shape))))
    with torch.no_grad():
        kept = model.aggregator(torch.rand(2, 3, 3, 28, 42), {0, 3})
    assert [name for name, _ in order] == [
        f"{kind}{i}" for p in (0, 2) for kind in ("frame", "global") for i in (p, p + 1)
    ]
    assert order[0][1] == (6, 11, 32) and order[2][1] == (2, 33, 32)
    assert {i: tuple(x.shape) for i, x in kept.items()} == dict.fromkeys((0, 3), (2, 3, 11, 64))


def test_views_in_chunks_give_the_same_maps(tiny, monkeypatch):
    images = torch.rand(1, 5, 3, 28, 28)
    whole = seen(tiny, images)
    monkeypatch.setattr(vggt_heads, "_CHUNK", 2)
    for name, value in seen(tiny, images).items():
        assert torch.allclose(value, whole[name], atol=1e-5), name


def test_quirks_of_the_release():
    unit, x = ResidualUnit(2), torch.randn(1, 2, 4, 4)
    torch.nn.init.zeros_(unit.conv2.weight)
    torch.nn.init.zeros_(unit.conv2.bias)
    assert torch.equal(unit(x), x.relu())  # its first ReLU works in place
    assert offset_grid(1)[0].tolist() == [[-1, -1], [-1, 0], [-1, 1]]  # slow axis moves x


@pytest.mark.parametrize("activation", vggt_heads._ACTIVATIONS)
def test_every_activation_is_finite_in_float32(activation):
    head = DPTHead("point_head", 14, 32, **DENSE, activation=activation, conf_activation="sigmoid")
    values, confidence = head.activate(torch.randn(1, 2, 4, 3, 3).half())
    assert values.shape == (1, 2, 3, 3, 3) and values.dtype == confidence.dtype == torch.float32
    assert torch.isfinite(values).all() and ((confidence > 0) & (confidence < 1)).all()


def test_bfloat16_stays_close(inputs):
    model = built()
    want = seen(model, *inputs)
    found = seen(model.bfloat16(), *inputs)
    for name in ("pose_enc", "depth", "world_points", "track"):
        # bfloat16 has 8 bits: 4e-3 an operation, some dozens in a row.
        assert (
            found[name].dtype == torch.float32 and (found[name] - want[name]).abs().max() < 0.1 * want[name].abs().max()
        )


@pytest.mark.slow
def test_export_has_free_batch_views_and_points(inputs):
    dense = {**DENSE, "intermediate_layer_idx": (0,) * 4}
    heads = dict(depth_head=dense, point_head=None, camera_head={**TINY["camera_head"], "num_iterations": 2})
    tracks = {**TINY["track_head"], "feature_extractor": dense, "iters": 1}
    model = built({**changed("aggregator", depth=1), **heads, "track_head": tracks})
    model.diagnostics = False
    batch, views, points = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "views", "points"))
    program = torch.export.export(
        model, inputs, dynamic_shapes=({0: batch, 1: views}, {0: batch, 1: points}), strict=False
    )
    attentions = [n for n in program.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    assert len(attentions) == 2 + 2 + 4  # aggregator, camera iterations, tracker
    images, query = torch.rand(3, 4, 3, 42, 56), torch.rand(3, 7, 2) * 40
    want, found = seen(model, images, query), program.module()(images, query)
    assert tuple(found) == model.output_names()
    for name in found:
        assert torch.allclose(found[name], want[name], atol=1e-4), name


def test_for_export_keeps_some_heads_and_shares_the_weights(tiny):
    twin = tiny.for_export(["depth", "camera"], views=2)
    assert [spec.name for spec in twin.interface.inputs] == ["images"] and twin.interface.inputs[0].shape[1] == 2
    assert twin.interface.outputs == ("pose_enc", "depth", "depth_conf") and not twin.diagnostics
    assert tiny.diagnostics and tiny.track_head is not None, "the model itself is as before"
    assert {id(p) for p in twin.parameters()} < {id(p) for p in tiny.parameters()}
    assert tiny.for_export().interface.free_axes == ("batch", "views", "points")
    with pytest.raises(UsageError, match="heads sky: this VGGT has camera, depth, point, track; name some of them"):
        tiny.for_export(["sky"])
    with pytest.raises(UsageError, match="views 0: a scene has at least one view"):
        tiny.for_export(None, views=0)


def test_checkpoint_with_heads_that_were_left_out(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "w.pt")
    model = create_model("vggt", weights=tmp_path / "w.pt", **{**TINY, "track_head": None, "point_head": None})
    assert "weights of track_head left out: the model was built without it" in " ".join(model.notes)
    assert torch.equal(model.camera_head.empty_pose_tokens, tiny.camera_head.empty_pose_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("heads, views", [(None, None), (["camera", "depth"], 3), (["track"], 1)], ids=str)
def test_bundle(tiny, tmp_path, heads, views):
    model = tiny.for_export(heads, views)
    bundle = edgeattn.export(model, ["onnxruntime", "openvino"], tmp_path / "b", recipe="float32")
    assert verify(bundle.path).ok and bundle.manifest.nodes["float32"]["Attention"] > 0
    assert [entry.name for entry in bundle.manifest.outputs] == list(model.interface.outputs)
    assert bundle.manifest.inputs[0].shape[:2] == ["batch", views or "views"]
