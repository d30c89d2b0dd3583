"""A trained model as it is exported: the recipe it carries, and its graph with weights as stored integers.

Weights lie on the trained grids exactly. 2- and 3-bit grids are int4 codes, StatsQ's as odd integers. StatsQ of 4 bits
has 16 odd levels, which no 4-bit integers are: w = s (c - 7.5) is stored as int4 codes c - 8, and the layer adds the
other half step as s / 2 times the sum of its inputs. Adding it to the weights instead would keep ONNX Runtime from its
kernel for 4-bit weights: dequantized anew in every call, layers took 3 to 12 times as long.

Activations stay Clip and Round in float32, which both runtimes compute exactly. Behind QuantizeLinear OpenVINO adds 128
before it rounds: at 2 bits a code moved somewhere in 81 of 100 pictures (1 of 100 otherwise), and the logits by a
quarter. Only the heads read int8, which nothing behind them could amplify and which the runtimes compute in.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeattn.errors import RecipeError
from edgeattn.quant.build import Built
from edgeattn.quant.graph import add_attribute, aten, attribute, calls, finish, is_call, module_path, set_input
from edgeattn.quant.placement import store
from edgeattn.quant.qat.convert import has_quantizers, quantized_weights
from edgeattn.quant.qat.lsq import SCALE_FLOOR, LsqQuantizer
from edgeattn.quant.qat.qkr import QueryKeyProduct
from edgeattn.quant.qat.settings import QatSettings
from edgeattn.quant.quantizer import weight_scale_floor
from edgeattn.quant.recipe import Recipe, load_recipe
from edgeattn.quant.weights import QuantizedWeight

# Of the logits' spread: how far they may be from the simulation, twice what was seen. Where a value lies on a rounding
# tie, another order of additions takes it to the next of a few codes: of 1,000 pictures 20 to 34 moved between float32
# and float64, by up to 0.43 (three DeiT of 64 px, w2a2); the others by 4e-7.
TIE_SHARE = 0.85
_DEFAULT = "w8a8"
_INT8 = (-128, 127)
_FROZEN = (aten.mul.Tensor, aten.round.default, aten.clamp.default, aten.div.Tensor)  # see `FrozenQuantizer`, backwards


class TrainedRecipe(Recipe):
    """What a model that was trained with quantizers carries in place of a recipe: there is nothing left to choose."""

    weights: None = None
    activations: None = None
    trained: QatSettings

    @property
    def has_variant(self) -> bool:
        """Always: the graph with stored integers."""
        return True


def recipe_for(model: nn.Module, asked: str | Path | Recipe | dict[str, Any] | None) -> Recipe:
    """The recipe asked for, w8a8 by default; of a model that was trained with quantizers its own.

    Raises:
        RecipeError: see `load_recipe`; or a recipe for a model that carries its own.
    """
    if not has_quantizers(model):
        return load_recipe(_DEFAULT if asked is None else asked)
    settings: Any = model.quantization
    own = TrainedRecipe(name=settings.name, trained=settings)
    if asked is None or asked in (settings.name, own):
        return own
    found = asked.name if isinstance(asked, Recipe) else asked["name"] if isinstance(asked, dict) else asked
    raise RecipeError(
        f"{getattr(model, 'name', type(model).__name__)} was trained with {settings.weight_bits}-bit weights and "
        f"{settings.activation_bits}-bit activations ({settings.name}), and recipe {str(found)!r} would quantize it "
        "once more. Leave the recipe out (--quant) to export it as it was trained, or give the float checkpoint that "
        "training started from."
    )


def build(float_graph: fx.GraphModule, model: nn.Module, recipe: TrainedRecipe) -> Built:
    """A copy of the frozen model's folded graph with the trained model's weights as stored integers."""
    graph, settings = copy.deepcopy(float_graph), recipe.trained
    layers = {_tensor_of(name, module): module for name, module in quantized_weights(model, edges=True).items()}
    counts: Counter[str] = Counter()
    for node in calls(graph, aten.conv2d.default, aten.linear.default):
        source = node.args[1]
        module = layers.pop(str(source.target), None) if isinstance(source, fx.Node) else None
        counts["float32" if module is None else _store(graph, node, module, settings)] += 1
    assert not layers, f"not in the graph: {', '.join(layers)}"
    return Built(finish(graph), recipe, dict(counts), [_note(settings)])


def _tensor_of(name: str, module: nn.Module) -> str:
    """Name of a layer's weight in the frozen model."""
    return f"{name}.product" if isinstance(module, QueryKeyProduct) else f"{name}.weight"


def _note(settings: QatSettings) -> str:
    has_half = settings.statsq and settings.weight_bits == 4
    half = ", with half a step added through the sum of the inputs" if has_half else ""
    return (
        f"{settings.name}: weights are stored on the trained grids, {settings.weight_bits} bits as "
        f"int{_stored_bits(settings.weight_bits)} codes per output channel{half}, the first convolution and the heads "
        f"as int8; activations lie on the trained grids of {settings.activation_bits} bits by Clip and Round in "
        "float32. The variant float32 is the same network with its weights as float32 numbers, not the float model "
        "that training started from"
    )


def _stored_bits(bits: int) -> int:
    return 4 if bits <= 4 else 8


def integers(module: Any) -> tuple[QuantizedWeight, bool]:
    """A layer's trained weight as signed integers; whether the grid lies half a step above codes times scale."""
    codes, scale, zero_point = module.weight_quantizer.export_grid(module.source().detach())
    has_half = zero_point % 1 != 0
    codes = (codes.to(torch.int16) - int(zero_point + 0.5 * has_half)).to(torch.int8)
    bits = _stored_bits(module.weight_quantizer.bits)
    return QuantizedWeight(codes, scale.detach().float().reshape(-1), bits, None), has_half


def _store(graph: fx.GraphModule, node: fx.Node, module: Any, settings: QatSettings) -> str:
    """Replace a layer's weight by its integers; returns what it is counted as."""
    stored, has_half = integers(module)
    if has_half:
        _add_half(graph, node, stored.scale)
    input_scale = _integer_input(graph, node, module, stored)
    store(graph, node, stored, input_scale)
    if input_scale is not None:
        return "int8"
    bits = settings.edge_bits if module.edge else settings.activation_bits
    return f"int{stored.bits} weights, {bits}-bit inputs, computed in float32"


def _add_half(graph: fx.GraphModule, node: fx.Node, scale: Tensor) -> None:
    """y + sum(x) s / 2 for a linear layer whose weight is half a step above what is stored."""
    half = add_attribute(graph, f"{module_path(node)}_half_step", scale / 2, node)
    with graph.graph.inserting_before(node.next):
        total = graph.graph.call_function(aten.sum.dim_IntList, (node.args[0], [-1], True))
        extra = graph.graph.call_function(aten.mul.Tensor, (total, half))
        result = graph.graph.call_function(aten.add.Tensor, (node, extra))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)


def _integer_input(graph: fx.GraphModule, node: fx.Node, module: Any, stored: QuantizedWeight) -> Tensor | None:
    """Quantize the input of an 8-bit head to int8, 0-dimensional scale; None where a layer computes in float32."""
    quantizer = module.input_quantizer if module.edge and isinstance(module, nn.Module) else None
    if not is_call(node, aten.linear.default) or not isinstance(quantizer, LsqQuantizer) or quantizer.limits != _INT8:
        return None
    scale = quantizer.scale.detach().clamp(min=SCALE_FLOOR).reshape(())
    bias = attribute(graph, node.args[2]) if len(node.args) > 2 else None
    if bias is not None and (weight_scale_floor(bias, scale) > stored.scale).any():
        return None  # its int32 bias would overflow
    source: Any = node.args[0]
    for target in _FROZEN:
        assert is_call(source, target), f"{module_path(node)}: {source} is no frozen quantizer"
        source = source.args[0]
    zero_point = torch.tensor(0, dtype=torch.int8)
    arguments = [
        add_attribute(graph, f"{node.name}_input_{name}", value, node)
        for name, value in (("scale", scale), ("zero_point", zero_point))
    ]
    with graph.graph.inserting_before(node):
        codes = graph.graph.call_function(torch.ops.edgeattn.quantize.default, (source, *arguments))
        set_input(node, 0, graph.graph.call_function(torch.ops.edgeattn.dequantize.default, (codes, *arguments)))
    return scale
