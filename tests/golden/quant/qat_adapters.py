"""Golden cases of quantization-aware training, by the `method` of their JSON: a case to the arrays to compare.

Everything in float64: a code that float32 moves by one is not an error of the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeattn.quant.qat.cga import Annealer, frozen_mask
from edgeattn.quant.qat.lsq import code_limits, initial_scale, lsq, lsq_plus
from edgeattn.quant.qat.qkr import key_bias_of, product_of, scores
from edgeattn.quant.qat.statsq import StatsQuantizer, codes, scale_of, statsq


def _inputs(case: Any) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.asarray(value)).double() for key, value in case.inputs.items()}


def _arrays(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy() for key, value in values.items()}


def _gradient(output: Tensor, by: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(output, of, by)[0]


def statsq_case(case: Any) -> dict[str, np.ndarray]:
    given, bits = _inputs(case), case.params["bits"]
    weight = given["w"].requires_grad_()
    got = {"scale": scale_of(weight), "codes": codes(weight, bits).long(), "wq": statsq(weight, bits)}
    if "grad_out" in given:
        got["grad_w"] = _gradient(statsq(weight, bits), given["grad_out"], weight)
        got["grad_w_clipped"] = _gradient(statsq(weight, bits, clipped_gradient=True), given["grad_out"], weight)
    return _arrays(got)


def cga_case(case: Any) -> dict[str, np.ndarray]:
    given, quantizer, wanted = _inputs(case), StatsQuantizer(case.params["bits"]), case.params["boundary_range"]
    if "updates" not in given:
        ranges = wanted if isinstance(wanted, list) else [wanted]
        masks = [frozen_mask(quantizer.position(given["w"]), boundary_range) for boundary_range in ranges]
        return {"frozen": np.stack([mask.numpy() for mask in masks]) if isinstance(wanted, list) else masks[0].numpy()}
    parameter = torch.nn.Parameter(given["w0"].clone())
    annealer, frozen = Annealer([(parameter, quantizer)], wanted), []
    for update in given["updates"]:
        frozen.append(frozen_mask(quantizer.position(parameter), wanted))
        annealer.before_step()
        with torch.no_grad():
            parameter += update
        annealer.after_step()
    masks = torch.stack(frozen)
    free = (~masks).flatten(1).sum(1)
    return _arrays({"frozen": masks, "w_final": parameter, "scale_final": scale_of(parameter), "free_per_step": free})


def qkr_case(case: Any) -> dict[str, np.ndarray]:
    given, bits, heads = _inputs(case), case.params["bits"], case.params["heads"]
    x, (qn, qp) = given["x"], code_limits(bits, signed=True)
    q, k = (given[key].unflatten(0, (heads, -1)) for key in ("wq", "wk"))
    dim, width = q.shape[1], x.shape[-1]
    product = product_of(q, k)
    stacked = product.flatten(0, 1)
    quantized = statsq(stacked, bits)
    x_q = lsq(x, given["act_scale_x"][None, :, None], qn, qp)

    def t(inputs: Tensor, weight: Tensor) -> Tensor:
        return (inputs @ weight.T).unflatten(-1, (heads, width))

    t_q = lsq(t(x_q, quantized), given["act_scale_wx"][None, :, :, None], qn, qp)
    with_activations = scores(x_q, t_q, None, dim)
    bias = key_bias_of(given["bq"].view(heads, dim), k)
    return _arrays(
        {
            "w_qk": product, "w_qk_scale": scale_of(stacked).view(heads, width, 1),
            "w_qk_codes": codes(stacked, bits).view(heads, width, width).long(),
            "w_qk_q": quantized.view(heads, width, width), "score_fp": scores(x, t(x, stacked), None, dim),
            "score_w_only": scores(x, t(x, quantized), None, dim), "score_wa": with_activations,
            "prob_wa": with_activations.softmax(-1), "key_bias": bias,
            "prob_fp_with_bias": scores(x, t(x, stacked), bias, dim).softmax(-1),
        }
    )  # fmt: skip


def lsq_case(case: Any) -> dict[str, np.ndarray]:
    given, (qn, qp) = _inputs(case), code_limits(case.params["bits"], case.params["signed"])
    x, scale = given["x"].requires_grad_(), given["scale"].requires_grad_()
    y = lsq(x, scale, qn, qp)
    got = {"y": y, "init_scale": initial_scale(x, scale.shape, qp)}
    if "grad_out" in given:
        got["grad_x"], got["grad_scale"] = torch.autograd.grad(y, [x, scale], given["grad_out"])
    if "offset" in given:
        offset = given["offset"].requires_grad_()
        got["y_plus"] = lsq_plus(x, scale, offset, qn, qp)
        if "grad_out" in given:
            got["grad_offset_plus"] = _gradient(got["y_plus"], given["grad_out"], offset)
    return _arrays(got)


QAT_METHODS: dict[str, Callable[[Any], dict[str, np.ndarray]]] = {
    "statsq": statsq_case, "cga": cga_case, "qkr": qkr_case, "lsq": lsq_case,
}  # fmt: skip
