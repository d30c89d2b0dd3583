import pytest
import torch

import edgeattn
from edgeattn import create_model
from edgeattn.data.interface import classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import UsageError
from edgeattn.export.onnx_model import to_onnx
from edgeattn.models.folding import fuse_attention
from edgeattn.models.shvit import SHViT
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture
from edgeattn.runtime.verify import verify
from tests.conftest import randomize

TINY = dict(embed_dim=(32, 44, 64), depth=(1, 1, 2), partial_dim=(8, 11, 17), qk_dim=(8, 8, 8))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = randomize(create_model("shvit_s1", num_classes=10, img_size=64, **TINY))
    model.preprocessing = Preprocessing(size=(64, 64))
    return model


@pytest.mark.parametrize("size", [16, 65, 224, (48, 100)], ids=str)
def test_any_size_keeps_the_function_when_fused_and_folded(size):
    torch.manual_seed(0)
    model = randomize(create_model("shvit_s1", img_size=size, num_classes=7, **TINY))
    x = torch.randn(2, 3, *model.preprocessing.size)
    graph = capture(fuse_attention(model), classifier_interface(x.shape[2:]))
    assert fold(graph)["residual_depthwise"] == 4 + 4
    with torch.no_grad():
        want, got = model(x), graph(x)
    assert got.shape == (2, 7) and (want - got).abs().max() < 1e-4 * want.std()


def test_sizes_and_types_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="8x224 is too small for SHViT"):
        create_model("shvit_s1", img_size=(8, 224))
    with pytest.raises(UsageError, match=r"'s' .* or 'i'"):
        create_model("shvit_s1", types=("i", "x", "s"))


def test_timm_names(tiny):
    def to_timm(key):
        stage, _, rest = key.partition(".")
        if not stage.startswith("blocks"):
            return key
        number, (index, _, rest) = int(stage[-1]), rest.partition(".")
        if number == 1 or int(index) >= 3:
            return f"stages.{number - 1}.blocks.{int(index) - (3 if number > 1 else 0)}.{rest}"
        if index == "1":
            return f"stages.{number - 1}.downsample.2.{rest}"
        inner, _, rest = rest.partition(".")
        return f"stages.{number - 1}.downsample.{(0 if index == '0' else 3) + int(inner)}.{rest}"

    keys = list(tiny.state_dict())
    assert [SHViT.from_timm_key(to_timm(key)) for key in keys] == keys == [SHViT.from_timm_key(k) for k in keys]
    assert to_timm("blocks2.2.1.m.pw1.c.weight") == "stages.1.downsample.4.m.pw1.c.weight"


@pytest.mark.slow
def test_quantized_export_runs_as_function_body_without_a_fallback(tiny, tmp_path, pictures):
    bundle = edgeattn.export(tiny, ["onnxruntime", "openvino"], tmp_path / "b", data=pictures)
    assert verify(bundle.path).ok and bundle.manifest.precision["attention: int8 weights, float32 activations"] == 3
    session = bundle.open_session("onnxruntime")
    placement = session.placement()
    # The plugin has no kernel for this op yet, so none is expected.
    assert (placement.fused, placement.inlined, placement.expects_fused) == (0, 3, False)


def test_one_function_serves_every_width(tiny):
    graph = capture(fuse_attention(tiny), classifier_interface((64, 64)))
    fold(graph)
    model = to_onnx(graph, classifier_interface((64, 64)))
    assert [f.name for f in model.functions] == ["SingleHeadAttention"]
