"""Hadamard rotations merged into weights, without an operation at run time: QuaRot (arXiv 2404.00456), section 4."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, fx

from edgeattn.quant.graph import finish
from edgeattn.quant.layout import Flow
from edgeattn.quant.rewrite_stream import rotate_streams
from edgeattn.quant.rewrite_values import rotate_values


def rotate(graph: fx.GraphModule, pictures: Tensor) -> str:
    """Rotate residual streams, and the values of attention head by head, where they fit; returns what was done.

    `pictures` (N, 3, H, W): two are enough, only the sizes of tensors are looked at.
    """
    flow = Flow(graph, pictures)
    streams, streams_left = rotate_streams(graph, flow)
    values, values_left = rotate_values(graph, flow)
    finish(graph)
    return f"rotated {streams} residual streams{_left(streams_left, 'LayerNorms that read others')}; " + (
        f"rotated the values of {values} attentions{_left(values_left, 'others')}"
    )


def _left(reasons: Counter[str], what: str) -> str:
    said = ", ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
    return f", left {reasons.total()} {what} ({said})" if reasons else ""
