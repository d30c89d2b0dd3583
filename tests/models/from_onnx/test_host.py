"""Sizes computed in a file's graph: they follow a free batch through tracing, and never depend on values."""

import numpy as np
import onnx
import pytest
import torch

from edgeattn.data.interface import Interface, TensorSpec
from edgeattn.errors import UnsupportedOp
from edgeattn.models.from_onnx.graph import build_graph
from edgeattn.models.from_onnx.node import HOST_OPS, OPS, host_op
from edgeattn.quant.graph import capture
from tests.models.from_onnx.test_ops import run_onnxruntime

HEAD = '<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4, 6] x) => (float[N, K] y) '
CHAINS = {
    "flatten": """{
        s = Shape (x) i = Constant <value = int64 {0}> () n = Gather (s, i) a = Constant <value = int64[1] {0}> ()
        u = Unsqueeze (n, a) m = Constant <value = int64[1] {-1}> () t = Concat <axis = 0> (u, m)
        y = Reshape (x, t) }""",
    "product": """{
        s = Shape (x) a = Constant <value = int64[1] {0}> () b = Constant <value = int64[1] {1}> ()
        e = Constant <value = int64[1] {1000}> () h = Slice (s, a, b) t = Slice (s, b, e)
        p = ReduceProd <keepdims = 1> (t) c = Concat <axis = 0> (h, p) y = Reshape (x, c) }""",
    "arithmetic": """{
        s = Shape (x) n, c, l = Split (s) two = Constant <value = int64[1] {2}> () h = Div (c, two)
        w = Mul (l, two) f = Cast <to = 1> (w) g = Floor (f) i = Cast <to = 7> (g) t = Concat <axis = 0> (n, h, i)
        r = Reshape (x, t) y = Flatten (r) }""",
    "expand": """{
        s = Shape (x) i = Constant <value = int64 {0}> () n = Gather (s, i) a = Constant <value = int64[1] {0}> ()
        u = Unsqueeze (n, a) one = Constant <value = int64[2] {1, -1}> () t = Concat <axis = 0> (u, one)
        h = Shape (t) k = ConstantOfShape <value = int64[1] {1}> (h) m1 = Constant <value = int64 {-1}> ()
        neg = Mul (k, m1) q = Equal (t, neg) w = Where (q, k, t)
        z = Constant <value = float[1, 1, 6] {1, 2, 3, 4, 5, 6}> ()
        e = Expand (z, w) c = Concat <axis = 1> (e, x) y = Flatten (c) }""",
    "full and range": """{
        s = Shape (x) v = ConstantOfShape <value = float[1] {0.5}> (s) q = Add (x, v)
        zero = Constant <value = int64 {0}> () one = Constant <value = int64 {1}> ()
        six = Constant <value = int64 {6}> () r = Range (zero, six, one) f = Cast <to = 1> (r) p = Add (q, f)
        y = Flatten (p) }""",
    "positions": """{
        s = Shape (x) i = Constant <value = int64 {2}> () l = Gather (s, i) zero = Constant <value = int64 {0}> ()
        one = Constant <value = int64 {1}> () r = Range (zero, l, one) f = Cast <to = 1> (r) p = Add (x, f)
        y = Flatten (p) }""",
    "size": """{
        n = Size (x) d = Constant <value = int64 {24}> () b = Div (n, d) a = Constant <value = int64[1] {0}> ()
        u = Unsqueeze (b, a) m = Constant <value = int64[1] {-1}> () t = Concat <axis = 0> (u, m)
        y = Reshape (x, t) }""",
    "scale": """{
        s = Shape (x) i = Constant <value = int64 {2}> () l = Gather (s, i) f = Cast <to = 1> (l) r = Sqrt (f)
        d = Div (x, r) y = Flatten (d) }""",
    "count": """{
        s = Shape (x) i = Constant <value = int64 {0}> () n = Gather (s, i) f = Cast <to = 1> (n)
        d = Div (x, f) y = Flatten (d) }""",
}


@pytest.mark.parametrize("name", CHAINS)
def test_sizes_follow_a_free_batch(name):
    model = onnx.parser.parse_model(HEAD + CHAINS[name])
    x = np.random.default_rng(0).standard_normal((5, 4, 6), np.float32)
    (want,) = run_onnxruntime(model, {"x": x})
    graph = build_graph(model, ["x"])
    captured = capture(graph, Interface((TensorSpec("x", ("batch", 4, 6)),), ("y",)))
    for one in (graph, captured):  # traced at another batch size
        np.testing.assert_allclose(one(torch.from_numpy(x)).numpy(), want, rtol=1e-6)


def test_sizes_that_depend_on_values_are_refused():
    text = """{ i = ArgMax <axis = 1, keepdims = 0> (x) m = Constant <value = int64[1] {-1}> ()
        s = Reshape (i, m) y = Reshape (x, s) }"""
    model = onnx.parser.parse_model(HEAD + text)
    with pytest.raises(
        UnsupportedOp, match=r"takes 's' as sizes, which Reshape node .* computes from values. Expected"
    ):
        build_graph(model, ["x"])


def test_host_ops_keep_plain_numbers_plain():
    """What eager runs compute on sizes is numpy's own whole numbers, so that no object array reaches torch."""
    model = onnx.parser.parse_model(HEAD + CHAINS["arithmetic"])
    graph = build_graph(model, ["x"])
    seen = []
    graph.run([torch.zeros(2, 4, 6)], lambda node, results: seen.extend(results))
    hosts = [value for value in seen if isinstance(value, np.ndarray)]
    assert len(hosts) > 6 and {value.dtype.kind for value in hosts} == {"i", "f"}
    assert HOST_OPS.keys() - OPS.keys() == set()


def test_host_ops_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="'Concat' is registered twice for host values"):
        host_op("Concat")(lambda node, x: x)
