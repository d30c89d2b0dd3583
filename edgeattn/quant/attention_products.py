"""The two matrix products inside attention: queries with keys, and probabilities with values.

Lin et al., "FQ-ViT" (arXiv 2111.13824), section 3.3: probabilities as powers of two; its integer exponential is left
out. Yuan et al., "PTQ4ViT" (arXiv 2111.12293), section 3.2: twin uniform grids, for small and for large probabilities;
the squared gradients that weight its search are left out: they need labels. A stock runtime has operators for neither
and computes the values of their codes in float32.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from edgeattn.quant.graph import add_attribute, aten, attribute, calls, finish, is_call, module_path, set_input
from edgeattn.quant.methods import softmax
from edgeattn.quant.recipe import Recipe
from edgeattn.quant.rewrite import Misfit
from edgeattn.quant.steps import AttentionProducts

ATTENTION = aten.scaled_dot_product_attention.default
SPLITS = tuple(2.0**-m for m in range(20))  # PTQ4ViT's candidates
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_PRECISION = "product_precision"  # key in a product's meta
# Of probabilities with values.
_PRECISIONS = {
    "uniform": "int8", "log2": "float32, log2 codes simulated", "twin": "float32, twin codes simulated",
}  # fmt: skip
# Added to a masked score, whose probability is exactly 0 then; the exporter refuses infinite constants.
_MASKED = torch.finfo(torch.float32).min / 2
_BATCH = 16


def split_attention(graph: fx.GraphModule, step: AttentionProducts, recipe: Recipe) -> str:
    """Write every attention that no rule leaves in float as two products and a softmax; returns what was done.

    Queries (..., L, E), keys (..., S, E) and values (..., S, V) give softmax(scale queries @ keys^T + mask) @ values.
    The scale is applied to the queries: they are fewer numbers than the scores (..., L, S).
    """
    own = [n for n in graph.graph.nodes if getattr(n.target, "namespace", "") == "edgeattn"]
    left, count = Counter({"in an op of edgeattn": len(own)} if own else {}), 0
    for node in calls(graph, ATTENTION):
        rule = recipe.rule_for(module_path(node))
        try:
            if rule is not None and (rule.is_float or rule.activations == "float"):
                raise Misfit(rule.reason or f"rule {rule.modules!r}")
            _split(graph, node, step)
            count += 1
        except Misfit as reason:
            left[str(reason)] += 1
    finish(graph)
    said = f"quantized the products of {count} attentions"
    if count:
        said += f" (probabilities: {step.softmax}, {step.code_bits} bits)"
    elif not left:
        said += ": none is a call of scaled_dot_product_attention"
    reasons = ", ".join(f"{number}: {reason}" for reason, number in left.most_common())
    return f"{said}; left those of {left.total()} in float32 ({reasons})" if left else said


def _split(graph: fx.GraphModule, node: fx.Node, step: AttentionProducts) -> None:
    """
    Raises:
        Misfit: what the attention computes is not of this form; nothing is changed.
    """
    given: dict[str, Any] = {**dict(zip(_PARAMETERS, node.args, strict=False)), **node.kwargs}
    size, scale, mask = given["query"].meta["val"].shape[-1], given.get("scale"), given.get("attn_mask")
    if any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        raise Misfit("causal, with dropout or with grouped queries")
    if scale is None and not isinstance(size, int):
        raise Misfit("its vectors have no fixed size")
    constant = None if mask is None else _additive(_evaluated(graph, mask).detach())
    path = module_path(node)

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.graph.call_function(target, args)
        made.meta["module_path"] = path
        return made

    with graph.graph.inserting_before(node):
        queries = call(aten.mul.Tensor, given["query"], size**-0.5 if scale is None else scale)
        products = [call(aten.matmul.default, queries, call(aten.transpose.int, given["key"], -2, -1))]
        scores = products[0]
        if constant is not None:
            scores = call(aten.add.Tensor, scores, add_attribute(graph, f"{path}.mask", constant, node))
        products.append(call(aten.matmul.default, call(aten.softmax.int, scores, -1), given["value"]))
    products[0].meta[_PRECISION] = "int8"
    products[1].meta = {**node.meta, _PRECISION: _PRECISIONS[step.softmax]}
    node.replace_all_uses_with(products[1])
    graph.graph.erase_node(node)


def _evaluated(graph: fx.GraphModule, node: fx.Node) -> Any:
    """
    Raises:
        Misfit: the node depends on the model's input.
    """
    if node.op == "get_attr":
        return attribute(graph, node)
    if node.op != "call_function":
        raise Misfit("its mask depends on the input")
    args, options = fx.map_arg((node.args, node.kwargs), lambda arg: _evaluated(graph, arg))
    return node.target(*args, **options)  # type: ignore[operator]


def _additive(mask: Tensor) -> Tensor:
    """What a mask adds to the scores.

    Raises:
        Misfit: a query sees nothing through it: torch gives 0 there, softmax does not.
    """
    added = torch.where(mask, 0.0, _MASKED) if mask.dtype == torch.bool else mask.clamp(min=_MASKED)
    if (added == _MASKED).all(-1).any():
        raise Misfit("a query sees nothing through its mask")
    return added


def product_precision(node: fx.Node) -> str | None:
    """What a product that `split_attention` made is computed in once it is quantized; None for other nodes."""
    return node.meta.get(_PRECISION)


def observed_inputs(product: fx.Node) -> list[fx.Node]:
    """The inputs of a product whose range calibration finds: all but probabilities."""
    first = 1 if is_call(product.args[0], aten.softmax.int) else 0
    return [arg for arg in product.args[first:] if isinstance(arg, fx.Node)]


def encode_probabilities(
    graph: fx.GraphModule, products: dict[fx.Node, str], step: AttentionProducts, symmetric: bool, pictures: Tensor
) -> list[str]:
    """Put the probabilities that a plan's products read on the step's grid; returns what was searched.

    Args:
        symmetric: signed codes with zero point 0, for targets that have no others.
        pictures: (N, 3, H, W), for the search of twin's splits, on what the float model computes.
    """
    found = {node: node.args[0] for node in products if is_call(node.args[0], aten.softmax.int)}
    splits = _best_splits(graph, list(found), step, pictures) if step.softmax == "twin" else {}
    for product, p in found.items():
        assert isinstance(p, fx.Node)
        with graph.graph.inserting_before(product):
            if step.softmax == "uniform":
                values = _uniform(graph, p, step.code_bits, symmetric, product)
            else:
                # The methods as they are, recorded node by node.
                values = _coded(fx.Proxy(p, GraphAppendingTracer(graph.graph)), step, splits.get(product, 1.0)).node
        set_input(product, 0, values)
    chosen = ", ".join(f"{module_path(node)}: {split:g}" for node, split in splits.items())
    return [f"probabilities split between the twin grids at {chosen}"] if chosen else []


def _uniform(graph: fx.GraphModule, p: fx.Node, bits: int, symmetric: bool, before: fx.Node) -> fx.Node:
    """Codes 0 to 2^bits - 1 of 0 to 1; signed ones end at 127."""
    dtype = torch.int8 if symmetric else torch.uint8
    scale = torch.tensor(1 / min(2**bits - 1, torch.iinfo(dtype).max))
    grid = [
        add_attribute(graph, f"{p.name}_scale", scale, before),
        add_attribute(graph, f"{p.name}_zero_point", torch.tensor(0, dtype=dtype), before),
    ]
    codes = graph.graph.call_function(torch.ops.edgeattn.quantize.default, (p, *grid))
    return graph.graph.call_function(torch.ops.edgeattn.dequantize.default, (codes, *grid))


def _coded(p: Any, step: AttentionProducts, split: float) -> Any:
    """The values of the codes of probabilities, a tensor or a proxy of one."""
    if step.softmax == "log2":
        return softmax.log2_decode(*softmax.log2_encode(p, step.code_bits))
    return softmax.twin_decode(softmax.twin_encode(p, split, step.code_bits), split, step.code_bits)


def _best_splits(
    graph: fx.GraphModule, products: list[fx.Node], step: AttentionProducts, pictures: Tensor
) -> dict[fx.Node, float]:
    """The candidate with the least squared error of each product's result; ties: the first."""
    errors = {node: torch.zeros(len(SPLITS), dtype=torch.float64) for node in products}

    class Search(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in errors:
                p, v = self.fetch_args_kwargs_from_env(n)[0]
                for i, split in enumerate(SPLITS):
                    errors[n][i] += float((_coded(p, step, split) @ v - value).double().square().sum())
            return value

    with torch.no_grad():
        for batch in pictures.split(_BATCH):
            Search(graph).run(batch)
    return {node: SPLITS[int(sums.argmin())] for node, sums in errors.items()}
