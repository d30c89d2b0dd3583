"""What each layer costs when it alone is quantized: where accuracy is lost, and what a budget should spend bits on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from edgeattn.data.interface import interface_of
from edgeattn.data.labels import label_indices, label_of
from edgeattn.data.source import open_source
from edgeattn.errors import UsageError
from edgeattn.models.folding import fuse_attention
from edgeattn.quant import placement, weights
from edgeattn.quant.calibration import Calibrator, Progress
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import aten, attribute, capture, is_call, module_path
from edgeattn.quant.observers import Observer
from edgeattn.quant.quantizer import activation_parameters
from edgeattn.quant.recipe import Recipe, load_recipe

_BATCH = 8  # pictures whose every activation is held at once


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
    """One layer, quantized alone.

    Attributes:
        module: path in the model's own names.
        kind: conv, linear, add or attention.
        block: equal for layers at the same place of identical blocks.
        weights, activations: what they are stored as; "float32" where they are not quantized.
        size_bytes: of the weights, scales included; float_bytes: of the same in float32.
        sqnr_db: of the logits against float32, infinite where they do not change.
        kl: divergence of float32's class probabilities from these, nats per picture.
        loss: rise of the cross-entropy per picture; None without labels.
        second_order: half the sum of squared gradients times squared output errors (the diagonal Fisher estimate of the
            rise of the loss; HAWQ, BRECQ), per picture; None without labels.
    """

    module: str
    kind: str
    block: str
    weights: str
    activations: str
    size_bytes: int
    float_bytes: int
    sqnr_db: float
    kl: float
    loss: float | None
    second_order: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite ratio is null."""
        values = dataclasses.asdict(self)
        values["sqnr_db"] = self.sqnr_db if self.sqnr_db < float("inf") else None
        return values


def sensitivity(
    model: nn.Module,
    data: Any,
    recipe: str | Recipe | dict[str, Any] = "w8a8",
    *,
    images: int = 32,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> list[LayerSensitivity]:
    """Quantize every layer that a recipe would quantize, one at a time, and look at the logits; in graph order.

    Weights are rounded to nearest: what the recipe's steps would win back is not counted.

    Args:
        model: a classifier (see `quantize`). data: calibration pictures; with labels for loss and second order.
        images: pictures that the effect is measured on, spread over the data.
        progress: called with (stage, done, total).

    Raises:
        UsageError: not a classifier, or a recipe that quantizes nothing. DataError: labels that do not fit the model.
        RecipeError, DataError: as `quantize`.
    """
    chosen = load_recipe(recipe).for_targets(["onnxruntime"])
    model = getattr(model, "for_export", lambda: model)()
    interface, preprocessing = interface_of(model), getattr(model, "preprocessing", None)
    if not interface.is_classifier or preprocessing is None:
        raise UsageError(f"{getattr(model, 'name', type(model).__name__)} is no classifier; sensitivity is of logits.")
    if chosen.is_float:
        raise UsageError(f"recipe {chosen.name!r} quantizes nothing; name one such as w8a8 or w4a16.")
    source = open_source(data, skip_bad)
    graph = capture(fuse_attention(model), interface)
    fold(graph)
    plan = placement.plan(graph, chosen)
    ranges = observed_ranges(graph, plan, chosen, Calibrator(source, chosen, preprocessing, progress))
    layers = stand_ins(graph, plan, chosen, ranges)
    if not layers:
        raise UsageError(f"recipe {chosen.name!r} quantizes nothing of this model; its rules leave every layer float.")
    seen, classes = _Sums(), next(iter(reversed(graph.graph.nodes))).all_input_nodes[0].meta["val"].shape[-1]
    index = label_indices(source, getattr(model, "class_names", None), classes) if source.labelled else None
    shown = list(source.spread(images))
    for start in range(0, len(shown), _BATCH):
        samples = shown[start : start + _BATCH]
        pictures = torch.stack([torch.from_numpy(preprocessing(sample.image)) for sample in samples])
        labels = None if index is None else torch.tensor([index(label_of(s), s.name) for s in samples])
        seen.add(graph, layers, pictures, labels)
        if progress:
            progress("sensitivity", start + len(samples), len(shown))
    return [seen.result(graph, layer) for layer in layers]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A node and what it would compute if it were quantized: arguments and result on their grids.

    The grid of a result that only a ReLU reads is the ReLU's.
    """

    node: fx.Node
    kind: str
    weight: dict[int, Tensor]  # by position in the arguments
    grids: dict[fx.Node, tuple[Tensor, Tensor]]
    labels: tuple[str, str]
    bytes: tuple[int, int]

    def output(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """What the node gives on the grids."""
        arguments = list(fx.map_arg(self.node.args, lambda n: self.on_grid(n, values[n])))
        for index, weight in self.weight.items():
            arguments[index] = weight
        return self.on_grid(self.node, self.node.target(*arguments, **self.node.kwargs))  # type: ignore[operator]

    def on_grid(self, node: fx.Node, value: Any) -> Any:
        """A tensor's value on its grid, if it has one here."""
        if node not in self.grids:
            return value
        codes = torch.ops.edgeattn.quantize(value, *self.grids[node])
        return torch.ops.edgeattn.dequantize(codes, *self.grids[node])


def observed_ranges(
    graph: fx.GraphModule, plan: placement.Plan, recipe: Recipe, calibrator: Calibrator
) -> dict[fx.Node, tuple[float, float]]:
    """(low, high) of every tensor of a plan, from one pass over the pictures."""
    if recipe.activations is None:
        return {}
    settings, symmetric = recipe.activations.observer, recipe.activations.signedness == "int8"
    observers = {node: Observer(module_path(node) or node.name, settings, symmetric) for node in plan.tensors}
    calibrator.run(graph, {node: [observer.see] for node, observer in observers.items()})
    return {node: observer.range() for node, observer in observers.items()}


def stand_ins(
    graph: fx.GraphModule, plan: placement.Plan, recipe: Recipe, ranges: Mapping[fx.Node, tuple[float, float]]
) -> list[StandIn]:
    """Every layer of a plan with its arguments on their grids, in graph order."""
    signedness = recipe.activations.signedness if recipe.activations else ""
    grids = {node: activation_parameters(*ranges[node], signedness) for node in ranges}
    layers = []
    attention = dict(plan.attention)
    for node in graph.graph.nodes:
        if node in plan.weighted:
            stored = {1: weights.quantize(_tensor(graph, node.args[1]), plan.weighted[node], None, None, None)}
            kind = "linear" if is_call(node, aten.linear.default) else "conv"
        elif node in attention:
            spec = attention[node]
            places = [i for i, name in enumerate(spec.inputs) if name in spec.weights]
            stored = {i: weights.quantize(_tensor(graph, node.args[i]), weights.INT8, None, None, None) for i in places}
            kind = "attention"
        elif node in plan.adds:
            stored, kind = {}, "add"
        else:
            continue
        near = [*node.args[:2], *({placement.after_activation(node)} if node not in attention else ())]
        own = {n: grids[n] for n in near if isinstance(n, fx.Node) and n in grids and node not in plan.float_inputs}
        labels = next((s.label for s in stored.values()), "float32"), "int8" if own else "float32"
        sizes = sum(s.size_bytes for s in stored.values()), sum(4 * s.codes.numel() for s in stored.values())
        layers.append(StandIn(node, kind, {i: s.values for i, s in stored.items()}, own, labels, sizes))
    return layers


def _tensor(graph: fx.GraphModule, node: Any) -> Tensor:
    value = attribute(graph, node)
    assert value is not None
    return value


def noise_alone(graph: fx.GraphModule, layers: list[StandIn], pictures: Tensor) -> dict[fx.Node, float]:
    """Squared change of the logits when one layer is quantized, summed over pictures (N, 3, H, W), per layer."""
    sums = _Sums()
    for batch in pictures.split(_BATCH):
        sums.add(graph, layers, batch, None)
    return dict(sums.noise)


class _Sums:
    """What the logits of float32 and of every layer's stand-in add up to over the batches."""

    def __init__(self) -> None:
        self.images, self.signal, self.has_labels = 0, 0.0, True
        self.noise: dict[fx.Node, float] = defaultdict(float)
        self.kl: dict[fx.Node, float] = defaultdict(float)
        self.loss: dict[fx.Node, float] = defaultdict(float)
        self.second: dict[fx.Node, float] = defaultdict(float)

    def add(self, graph: fx.GraphModule, layers: list[StandIn], pictures: Tensor, labels: Tensor | None) -> None:
        """One batch: float32 with gradients once, then every layer's change through the nodes behind it."""
        values, gradients = _run(graph, pictures, labels, [layer.node for layer in layers])
        output = next(n for n in graph.graph.nodes if n.op == "output")
        logits = _first(values[output]).detach()
        self.images += len(pictures)
        self.signal += float(logits.square().sum())
        self.has_labels &= labels is not None
        plain = logits.double().log_softmax(1)
        with torch.no_grad():
            for layer in layers:
                changed = layer.output(values)
                got = _first(_rerun(graph, values, layer.node, changed)[output])
                self.noise[layer.node] += float((got - logits).square().sum())
                kl = F.kl_div(got.double().log_softmax(1), plain, reduction="sum", log_target=True)
                self.kl[layer.node] += max(0.0, float(kl))
                if labels is not None:
                    self.loss[layer.node] += float(_loss(got, labels) - _loss(logits, labels))
                    error = (changed - values[layer.node]).square()
                    self.second[layer.node] += 0.5 * float((gradients[layer.node].square() * error).sum())

    def result(self, graph: fx.GraphModule, layer: StandIn) -> LayerSensitivity:
        """The record of a layer."""
        noise = self.noise[layer.node]
        ratio = 10 * float(torch.tensor(self.signal / noise).log10()) if noise else float("inf")
        return LayerSensitivity(
            module=module_path(layer.node) or layer.node.name, kind=layer.kind, block=block_key(graph, layer.node),
            weights=layer.labels[0], activations=layer.labels[1], size_bytes=layer.bytes[0], float_bytes=layer.bytes[1],
            sqnr_db=ratio, kl=self.kl[layer.node] / self.images,
            loss=self.loss[layer.node] / self.images if self.has_labels else None,
            second_order=self.second[layer.node] / self.images if self.has_labels else None,
        )  # fmt: skip


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def _run(
    graph: fx.GraphModule, pictures: Tensor, labels: Tensor | None, wanted: list[fx.Node]
) -> tuple[dict[fx.Node, Any], dict[fx.Node, Tensor]]:
    """Every node's value, and the gradient of each picture's loss at the wanted ones."""
    values: dict[fx.Node, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in wanted and labels is not None and not value.requires_grad:
                value.requires_grad_()
            values[n] = value
            return value

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return _call(target, args, kwargs)

    with torch.set_grad_enabled(labels is not None):
        result = _first(Keep(graph, garbage_collect_values=False).run(pictures))
        if labels is None:
            return values, {}
        found = torch.autograd.grad(_loss(result, labels), [values[n] for n in wanted], materialize_grads=True)
    return values, dict(zip(wanted, found, strict=True))


def _call(target: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """A call that leaves its arguments alone: they are kept, and an operator in place writes into its first."""
    schema = getattr(target, "_schema", None)
    return target(args[0].clone(), *args[1:], **options) if schema and schema.is_mutable else target(*args, **options)


def _rerun(graph: fx.GraphModule, values: Mapping[fx.Node, Any], node: fx.Node, value: Tensor) -> dict[fx.Node, Any]:
    """Values of the output with one node's replaced; only what depends on it is computed."""
    changed: dict[fx.Node, Any] = {node: value}
    for later in graph.graph.nodes:
        if later is node or not any(arg in changed for arg in later.all_input_nodes):
            continue
        arguments, options = fx.map_arg((later.args, later.kwargs), lambda n: changed[n] if n in changed else values[n])
        changed[later] = arguments[0] if later.op == "output" else _call(later.target, arguments, options)
    return changed


def block_key(graph: fx.GraphModule, node: fx.Node) -> str:
    """Equal for nodes that do the same on tensors of the same shapes, at the same place under a numbered module."""
    path = (module_path(node) or node.name).split(".")
    place = ".".join("#" if part.isdigit() else part for part in path)
    tensors = [str(getattr(arg.meta.get("val"), "shape", "")) for arg in (node, *node.all_input_nodes)]
    others = [str(arg) for arg in node.args if not isinstance(arg, fx.Node)]
    return hashlib.sha256("|".join([place, str(node.target), *tensors, *others]).encode()).hexdigest()[:12]
