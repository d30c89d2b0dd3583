"""ONNX files as models: own and foreign exports, what is refused and how it is said, and the whole way to a bundle."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from edgeattn import create_model
from edgeattn.data.preprocessing import IMAGENET_MEAN
from edgeattn.errors import CheckpointError, NumericError, UnsupportedOp, UsageError
from edgeattn.export.onnx_model import save_onnx
from edgeattn.export.pipeline import export
from edgeattn.models.from_onnx import ops
from edgeattn.models.from_onnx.node import OPS, Op
from edgeattn.quant.quantize import quantize
from edgeattn.runtime.bundle import Bundle
from edgeattn.runtime.verify import verify
from tests.conftest import TINY, randomize


def write(path, text, opset=13, **constants):
    """A file from ONNX's text form; `constants` are its weights."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    onnx.save(model, path)
    return path


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# A classifier: convolution, mean of the pixels, linear layer.
HEADED = "(float[{batch}, 3, {h}, {w}] x) => (float[{batch}, 5] y) "
SMALL = HEADED + "{{ c = Conv (x, k) r = Relu (c) p = GlobalAveragePool (r) f = Flatten (p) y = Gemm (f, m) }}"


@pytest.fixture
def small(tmp_path):
    """Write that classifier with other axes of its input."""

    def make(batch="N", h=8, w=8, text=SMALL, **changes):
        constants = {"k": normal(4, 3, 3, 3), "m": normal(4, 5), **changes}
        return write(tmp_path / "small.onnx", text.format(batch=batch, h=h, w=w), **constants)

    return make


OWN = {
    "efficientvit_m0": dict(img_size=64, num_classes=10, **TINY),
    "shvit_s1": dict(img_size=64, num_classes=10, depth=(1, 1, 1)),
    "deit_tiny": dict(img_size=64, num_classes=10, depth=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_own_exports_come_back_as_standard_ops(name, tmp_path):
    torch.manual_seed(0)
    source = randomize(create_model(name, **OWN[name]))
    exported = quantize(source, "float32")
    save_onnx(exported.float_graph, exported.interface, tmp_path / "m.onnx")
    model = create_model(tmp_path / "m.onnx")
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        want, got = source(x), model(x)
    assert (got - want).abs().max() < 1e-5 * want.std()
    assert model.num_classes == 10 and model.interface == exported.interface and not model.training


def test_what_came_back_is_standard_ops_only(tiny_model, tmp_path):
    exported = quantize(tiny_model, "float32")
    save_onnx(exported.float_graph, exported.interface, tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx").functions
    again = quantize(create_model(tmp_path / "m.onnx"), "float32")
    targets = {str(node.target) for node in again.float_graph.graph.nodes}
    assert "aten.conv2d.default" in targets and not any("edgeattn" in target for target in targets)


class Cnn(nn.Module):
    """What torchvision's networks are made of."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.mixer, self.classifier = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = (x + self.block(x)).mean((2, 3))
        return self.classifier(torch.relu(self.mixer(x)))


@pytest.fixture(scope="module")
def cnn_file(tmp_path_factory):
    """The network, and its file as torch.onnx.export writes it, BatchNorms and all."""
    torch.manual_seed(0)
    model, path = randomize(Cnn()), tmp_path_factory.mktemp("cnn") / "cnn.onnx"
    torch.onnx.export(
        model, (torch.randn(2, 3, 64, 64),), path, dynamo=True, optimize=False, external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("N")},),
    )  # fmt: skip
    return model, path


def test_foreign_export_to_a_verified_int8_bundle(cnn_file, pictures, tmp_path):
    source, path = cnn_file
    model = create_model(path)
    assert sum(isinstance(layer, nn.Module) and "BatchNormalization" in str(layer) for layer in model.modules()) > 1
    rules = [{"modules": "mixer", "reason": "to see that rules reach it"}]
    bundle = export(model, ["onnxruntime"], tmp_path / "out", recipe={"name": "r", "rules": rules}, data=pictures)
    assert verify(bundle.path).ok
    notes = " ".join(bundle.manifest.notes)
    assert "2 conv_bn" in notes and "float32: mixer (to see that rules reach it)" in notes
    assert bundle.manifest.precision == {"int8": 3, "float32": 2}  # block, classifier and the sum; stem, mixer
    assert bundle.manifest.model == "cnn" and bundle.manifest.model_config_["file"] == "cnn.onnx"
    assert "ImageNet mean and standard deviation" in notes and bundle.manifest.preprocessing["mean"] == [*IMAGENET_MEAN]
    x = torch.randn(4, 3, 64, 64)
    session = bundle.open_session("onnxruntime", "float32")
    with torch.no_grad():
        want = source(x)
    assert np.abs(session.run({"image": x.numpy()})["logits"] - want.numpy()).max() < 1e-5 * want.std()
    session.close()


def test_layers_are_called_what_the_file_calls_them(cnn_file, small):
    names = {name for name, _ in create_model(cnn_file[1]).named_modules()}
    assert {"stem.0", "stem.1", "block.0", "mixer", "classifier"} <= names
    path = small()
    model = onnx.load(path)
    for node, name in zip(model.graph.node, ("/a/a.0/Conv", "", "/name", "name/", "/a.b-c/Gemm"), strict=True):
        node.name = name
    onnx.save(model, path)
    layers = [step.layer for step in create_model(path).steps]
    assert layers == ["a.a.0.Conv", "Relu_r", "name_", "name__2", "a.b_c.Gemm"]


def test_weights_are_parameters_once_and_statistics_are_not(cnn_file):
    source, path = cnn_file
    model = create_model(path)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in source.parameters())
    assert "stem.1.running_mean" in dict(model.named_buffers())


@pytest.mark.parametrize("opset", [11, 13])
def test_old_exports_with_chains_of_sizes(tmp_path, opset):
    """torch's first exporter reads sizes back from tensors, and splits heads with them."""
    axes = "<axes = [0]>" if opset == 11 else ""
    more = "" if opset == 11 else ", zero1"
    text = (
        "(float[N, 3, 8, 8] x) => (float[N, 5] y) {"
        f"c = Conv (x, k) s = Shape (c) zero = Constant <value = int64 {{0}}> () n = Gather (s, zero)"
        f" zero1 = Constant <value = int64[1] {{0}}> () u = Unsqueeze {axes} (n{more})"
        " heads = Constant <value = int64[2] {2, -1}> () t = Concat <axis = 0> (u, heads) q = Reshape (c, t)"
        " two = Constant <value = int64 {2}> () l = Gather (s, two) f = Cast <to = 1> (l) root = Sqrt (f)"
        " e = Div (q, root) a = Softmax <axis = 2> (e) o = Mul (a, q) flat = Constant <value = int64[1] {-1}> ()"
        " v = Concat <axis = 0> (u, flat) w = Reshape (o, v) y0 = MatMul (w, m) y = Add (b, y0) }"
    )
    path = write(tmp_path / "old.onnx", text, opset, k=normal(4, 3, 3, 3), m=normal(144, 5), b=normal(5))
    model = create_model(path)
    assert [step.node.op for step in model.steps][-1] == "edgeattn.Linear" and "bias" in str(list(model.state_dict()))
    captured = quantize(model, "float32").float_graph
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(captured(x), model(x))


def test_fixed_batch_of_one_is_freed(small):
    model = create_model(small(batch=1))
    assert model.interface.inputs[0].shape == ("batch", 3, 8, 8) and "fixed batch of 1 made free" in str(model.notes)
    assert model(torch.randn(3, 3, 8, 8)).shape == (3, 5)


BAKED = {
    "fails behind it": "f0 = Flatten (r) f = Reshape (f0, one)",
    "mixes the samples": "q = Reshape (r, tokens) t = Transpose <perm = [0, 2, 1]> (q) s = MatMul (q, t)"
    " a = Softmax (s) o = MatMul (a, q) f = Reshape (o, back)",
}


@pytest.mark.parametrize("how", BAKED)
def test_baked_batch_is_refused_and_named(small, how):
    text = SMALL.replace("p = GlobalAveragePool (r) f = Flatten (p)", BAKED[how])
    sizes = {"one": np.array([1, -1]), "tokens": np.array([1, -1, 36]), "back": np.array([-1, 144])}
    path = small(batch=1, text=text, m=normal(144, 5), **sizes)
    name = "Reshape_f" if how == "fails behind it" else "Reshape_q"
    with pytest.raises(
        UsageError, match=rf"batch size of 1 baked into node '{name}' \(Reshape\): .* dynamic batch axis"
    ):
        create_model(path)


def test_unsupported_ops_are_all_named_before_anything_runs(tmp_path):
    text = """(float[N, 4] x) => (float[N, 4] y) { a = NonZero (x) b = NonZero (x) c = Hardmax (x)
        d = com.microsoft.FusedThing (c) y = Relu (d) }"""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 13, "com.microsoft" : 1]> g {text}')
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedOp) as raised:
        create_model(tmp_path / "m.onnx")
    said = str(raised.value)
    assert "has 3 op type(s) that edgeattn cannot run: NonZero (node 'a', domain ai.onnx, opset 13), Hardmax" in said
    assert "FusedThing (node 'd', domain com.microsoft, opset 1)" in said and "package.module:callable" in said


def test_quantized_files_are_refused(small):
    text = SMALL.replace(
        "c = Conv (x, k)", "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) c = Conv (d, k)"
    )
    path = small(text=text, s=np.float32(0.1), z=np.uint8(128))
    with pytest.raises(UsageError, match=r"is already quantized \(QuantizeLinear 'q'\); give the float model"):
        create_model(path)


def test_free_sizes_need_img_size(small):
    path = small(h="H", w="W")
    with pytest.raises(UsageError, match=r"has free sizes \(H, W\); only the batch may be free. Pass img_size"):
        create_model(path)
    model = create_model(path, img_size=(16, 24))
    assert model.preprocessing.size == (16, 24) and model.interface.inputs[0].shape == ("batch", 3, 16, 24)
    with pytest.raises(UsageError, match=r"has its size fixed; img_size 16x16 cannot be set. Leave it out, or export"):
        create_model(small(), img_size=16)
    assert create_model(small(), img_size=8).preprocessing.size == (8, 8)


def damaged(kind, path):
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "undefined":
        model = onnx.load(path)
        model.graph.node[1].input[0] = "nothing"
        onnx.save(model, path)
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a model at all"}[kind])
    return path


@pytest.mark.parametrize(
    "kind, said",
    [
        ("truncated", r"cannot read .*small.onnx \(\d+ bytes\) as ONNX: .* truncated or corrupt.* export it again"),
        ("text", "truncated or corrupt, or not an ONNX file"),
        ("empty", "holds no ONNX graph; expected a model with nodes"),
        ("missing", "does not exist; expected an ONNX file, a name of the zoo"),
        ("undefined", "is not a valid ONNX model: .*nothing"),
    ],
)
def test_damaged_files(small, kind, said):
    error = UsageError if kind == "missing" else CheckpointError
    with pytest.raises(error, match=said):
        create_model(damaged(kind, small()))


def test_weights_in_a_file_of_their_own(small, tmp_path):
    model, x = onnx.load(small()), torch.randn(2, 3, 8, 8)
    want = create_model(small())(x)
    onnx.save_model(model, tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    torch.testing.assert_close(create_model(tmp_path / "e.onnx")(x), want)
    data = (tmp_path / "e.data").read_bytes()
    for left in (data[: len(data) // 2], None):
        (tmp_path / "e.data").write_bytes(left) if left else (tmp_path / "e.data").unlink()
        with pytest.raises(CheckpointError, match=r"is not a valid ONNX model: .* must lie beside it"):
            create_model(tmp_path / "e.onnx")


def test_float16_becomes_float32_and_says_so(small):
    model = onnx.load(small())
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    path = small()
    onnx.save(model, path)
    halved = create_model(path)
    assert any("float16 converted to float32" in note for note in halved.notes)
    assert {p.dtype for p in halved.parameters()} == {torch.float32} and halved.interface.is_classifier


def test_a_wrong_op_cannot_pass(small, monkeypatch):
    ops.load_onnx_ops()
    monkeypatch.setitem(OPS, "Relu", Op(lambda node, x: torch.relu(x) * 1.001))
    with pytest.raises(NumericError, match=r"node 'Relu_r' \(Relu, opset 13\) gives other values than onnxruntime"):
        create_model(small())


def test_a_node_that_fails_is_named(small, monkeypatch):
    ops.load_onnx_ops()
    monkeypatch.setitem(OPS, "Relu", Op(lambda node, x: x.reshape(7)))
    with pytest.raises(UnsupportedOp, match=r"node 'Relu_r' \(Relu, opset 13\) cannot be run with torch: shape"):
        create_model(small())


@pytest.mark.parametrize("given", [dict(weights="w.pth"), dict(num_classes=3), dict(embed_dim=64)], ids=str)
def test_arguments_that_the_file_decides(small, given):
    with pytest.raises(
        UsageError, match=rf"it has its weights, classes and architecture in it, so {next(iter(given))}"
    ):
        create_model(small(), **given)


@pytest.mark.parametrize(
    "text, opset, said",
    [
        ("(float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }", 6, "is of opset 6; expected 7 or newer. Convert it"),
        ("(uint8[N, 4] x) => (float[N, 4] y) { y = Cast <to = 1> (x) }", 13, "is uint8; expected float32"),
        ("(float[8, 4] x) => (float[8, 4] y) { y = Relu (x) }", 13, r"'x' of shape \[8, 4\]: expected a first axis"),
        (
            "(float[N, T] x) => (float[N, T] y) { y = Relu (x) }",
            13,
            r"free sizes \(T\).*Export it with these sizes fixed",
        ),
        ("(float[N, 4] x) => (float[4] y) { y = Identity (w) }", 13, "output 'y' is a constant"),
        ("() => (float[4] y) { y = Relu (w) }", 13, "has 0 inputs; expected a network of 1 to 6"),
    ],
    ids=["opset", "uint8", "batch 8", "free axis", "constant", "no input"],
)
def test_other_refusals(tmp_path, text, opset, said):
    path = write(tmp_path / "m.onnx", text, opset, **({"w": normal(4)} if "w" in text else {}))
    with pytest.raises((UsageError, UnsupportedOp), match=said):
        create_model(path)


def test_networks_that_are_no_classifiers(tmp_path):
    """Two inputs, one of them an index, and two outputs."""
    text = """(float[N, 4] x, int64[N] i) => (float[N, 4] y, float[N] z) { e = Gather (table, i) y = Add (x, e)
        a = Constant <value = int64[1] {1}> () z = ReduceSum <keepdims = 0> (y, a) }"""
    model = create_model(write(tmp_path / "m.onnx", text, table=normal(6, 4)))
    assert [(s.name, s.shape, s.dtype, s.high) for s in model.interface.inputs] == [
        ("x", ("batch", 4), "float32", 0), ("i", ("batch",), "int64", 6)
    ]  # fmt: skip
    assert model.interface.outputs == ("y", "z") and model.preprocessing is None and model.num_classes is None
    assert "input 'i' is tried with whole numbers below 6" in str(model.notes)
    bundle = export(model, ["onnxruntime"], tmp_path / "out", recipe="float32")
    assert bundle.manifest.task == "other" and verify(bundle.path).ok


def test_what_an_output_of_probabilities_means_is_noted(small):
    text = SMALL.replace("y = Gemm (f, m)", "g = Gemm (f, m) y = Softmax <axis = 1> (g)")
    assert "its output ends in Softmax" in str(create_model(small(text=text)).notes)


def test_export_command_takes_a_file_without_weights(edgeattn, small, tmp_path):
    out = tmp_path / "out"
    code, _, error = edgeattn("export", small(h="H", w="W"), "-o", out, "--quant", "float32", "--img-size", "8")
    assert code == 0, error
    assert Bundle.open(out).manifest.model == "small"
    for option, said in (
        ("--random-weights", "leave out --random-weights"),
        ("--weights=w.pth", "weights cannot be set"),
    ):
        code, _, error = edgeattn("export", small(), "-o", tmp_path / "other", "--quant", "float32", option)
        assert code == 2 and said in error and not (tmp_path / "other").exists()
    code, _, error = edgeattn("export", tmp_path / "no.onnx", "-o", tmp_path / "other", "--quant", "float32")
    assert code == 2 and "no.onnx does not exist" in error


def test_value_infos_are_not_needed(small):
    """Files after simplifiers have none, or wrong ones."""
    path = small()
    model = onnx.load(path)
    model.graph.value_info.extend([helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, ["N", 4, 6, 6])])
    onnx.save(model, path)
    assert create_model(path).num_classes == 5
