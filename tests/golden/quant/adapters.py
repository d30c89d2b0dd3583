"""Each method of the quantization golden files, computed by the library in float64: METHODS maps the name in a file's
`method` to a function from the case to every output that the file may hold.

A key `params.NAME` is compared with the number that the file measured, where it has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeattn.quant.methods import (
    allocation,
    channel_balance,
    dual_smoothing,
    equalization,
    formats,
    gptq,
    integer,
    layernorm,
    rounding,
    sampling,
    smoothing,
    softmax,
)  # fmt: skip
from edgeattn.quant.methods.rotation import rotation
from edgeattn.quant.observers import entropy_threshold, mse_factor, percentile_range
from edgeattn.quant.scheme import Scheme

Case = Any  # tests.golden.quant.cases.Case
Outputs = dict[str, Any]


def inputs(case: Case) -> dict[str, Tensor]:
    """The case's inputs, floating ones in float64."""
    tensors = {key: torch.from_numpy(value) for key, value in case.inputs.items()}
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - test).square().sum()))


def group_of(case: Case) -> int | None:
    """The group size of a case; -1 and absence mean rows."""
    group = case.params.get("group", -1)
    return group if group and group > 0 else None


def momentum_act_max(case: Case) -> Outputs:
    statistic = smoothing.ActivationMaximum(case.params["momentum"])
    after = []
    for batch in inputs(case)["batches"]:
        statistic.update(batch)
        after.append(statistic.value)
    return {"act_scale": torch.stack(after)}


def adaround_cle_biascorr(case: Case) -> Outputs:
    given, p = inputs(case), case.params
    w, v, scale, scheme = given["w"], given["v"], given["scale"], Scheme(p["bits"], True, "channel")
    h = rounding.rectified_sigmoid(v, p["zeta"], p["gamma"])
    w1, b1, w2, cle_scale = equalization.equalize(given["w1"], given["b1"], given["w2"])
    return {
        "v_init": rounding.initial_v(w, scheme, scale, p["zeta"], p["gamma"]),
        "h": h,
        "w_soft": rounding.soft_weight(w, h, scheme, scale),
        "w_hard": rounding.hard_weight(w, v, scheme, scale),
        "regularizer": torch.stack([rounding.regularizer(h, beta) for beta in p["betas"]]),
        "cle_scale": cle_scale,
        "cle_w1": w1,
        "cle_b1": b1,
        "cle_w2": w2,
        "bias_correction": equalization.bias_correction(
            given["w1"], scheme.fake_quantize(given["w1"]), given["input_mean"]
        ),
    }


def awq_and_smoothquant(case: Case) -> Outputs:
    given, p = inputs(case), case.params
    x, w = given["x"], given["w"]
    found = smoothing.awq_search(x, w, Scheme(p["bits"], False, "group", p["group"]), p["grid"])
    smooth = smoothing.smoothquant_scale(x.abs().amax(0), smoothing.weight_maximum(w), p["smoothquant_alpha"])
    return {
        "awq_loss": found.loss,
        "awq_scale": found.scale,
        "awq_wq": found.wq,
        "smoothquant_scale": smooth,
        "params.best_ratio": found.ratio,
    }


def range_maxima(x: Tensor) -> Tensor:
    """The activation statistic of each leading entry of x (ranges, batch, tokens, channels)."""
    maxima = []
    for part in x:
        statistic = smoothing.ActivationMaximum()
        statistic.update(part)
        maxima.append(statistic.value)
    return torch.stack(maxima)


def channel_balancing(case: Case) -> Outputs:
    given, p = inputs(case), case.params
    x, w, bias, signs = (given[key] for key in ("x", "w", "bias", "signs"))
    maxima = range_maxima(x)
    scales = channel_balance.scale_per_range(maxima, w, p["alpha"])
    static = channel_balance.static_scale(maxima, w, p["alpha"])

    def layer(scale: Tensor | None, signs: Tensor | None = None) -> dual_smoothing.TransformedLinear:
        return channel_balance.quantize_balanced(w, bias, scale, signs, p["w_bits"], p["a_bits"])

    aware = channel_balance.quantize_per_range(w, bias, scales, p["ranges"], p["w_bits"], p["a_bits"])
    ways = {
        "plain": [layer(None)] * len(x),
        "scale_per_range": [aware.at(first) for first, _ in p["ranges"]],
        "static_scale": [layer(static)] * len(x),
        "rotate": [layer(None, signs)] * len(x),
        "static_scale_then_rotate": [layer(static, signs)] * len(x),
    }
    exact = torch.nn.functional.linear(x, w, bias)
    y = {name: torch.stack([way(part) for way, part in zip(layers, x, strict=True)]) for name, layers in ways.items()}
    return {
        "act_scale": maxima,
        "scale_per_range": scales,
        "static_scale": static,
        "rotation": rotation(signs),
        "y_fp": exact,
        **{f"y_{name}": y[name] for name in ("plain", "scale_per_range", "static_scale")},
        "y_static_then_rotate": y["static_scale_then_rotate"],
        "w_codes": ways["static_scale_then_rotate"][0].weight_codes,
        "incoherence_x": torch.stack([channel_balance.incoherence(part) for part in x]),
        "params.sqnr_db": {n: [sqnr_db(a, b) for a, b in zip(exact, v, strict=True)] for n, v in y.items()},
    }


def dual_smoothed(case: Case) -> Outputs:
    given, p = inputs(case), case.params
    x, w, bias, signs = (given[key] for key in ("x", "w", "bias", "signs"))

    def layer(steps: dual_smoothing.Steps, release: bool = False) -> dual_smoothing.TransformedLinear:
        statistic = smoothing.ActivationMaximum()
        statistic.update(dual_smoothing.before_smoothing(x, steps, signs))
        return dual_smoothing.dual_smooth(
            w, bias, statistic.value, signs, p["w_bits"], p["a_bits"], p["alpha"], steps, release
        )

    orders: dict[str, dual_smoothing.Steps] = {
        "rtn": (), "smooth": ("smooth",), "rotate": ("rotate",), "rotate_then_smooth": ("rotate", "smooth"),
        "smooth_then_rotate": ("smooth", "rotate"),
    }  # fmt: skip
    main = layer(dual_smoothing.DSFQ)
    x_codes, x_scale, _ = main.quantize_input(x)
    exact = torch.nn.functional.linear(x, w, bias)
    return {
        "rotation": rotation(signs),
        "channel_scale": main.transform.channel_scale,
        "channel_scale_release": layer(dual_smoothing.DSFQ, release=True).transform.channel_scale,
        "x_codes": x_codes,
        "x_scale": x_scale,
        "w_codes": main.weight_codes,
        "w_scale": main.weight_scale,
        "y_fp": exact,
        "y_q": main(x),
        "params.sqnr_db": {name: sqnr_db(exact, layer(steps)(x)) for name, steps in orders.items()},
    }


def dynamic_token(case: Case) -> Outputs:
    """All five through `Scheme`. A range shared by the batch is one per row of x with the token index in front."""
    x, bits, eps = inputs(case)["x"], case.params["bits"], case.params["eps"]
    token = Scheme(bits, False, "token", dynamic=True, least_scale=eps)
    scale, zero = token.parameters(x)
    shared, by_index = Scheme(bits, False, "channel", dynamic=True, least_scale=eps), x.transpose(0, 1)
    whole = Scheme(bits, False, "tensor", dynamic=True, least_scale=eps)
    symmetric = Scheme(bits, True, "token", dynamic=True)
    sym_scale, sym_zero = symmetric.parameters(x)
    return {
        "scale": scale,
        "zero": zero,
        "codes": token.encode(x, scale, zero),
        "y": token.fake_quantize(x),
        "scale_shared_batch": shared.parameters(by_index)[0].reshape(1, -1, 1),
        "y_shared_batch": shared.fake_quantize(by_index).transpose(0, 1),
        "scale_tensor": whole.parameters(x)[0].reshape(1, 1, 1),
        "y_tensor": whole.fake_quantize(x),
        "scale_sym": sym_scale,
        "codes_sym": symmetric.encode(x, sym_scale, sym_zero),
        "y_sym": symmetric.fake_quantize(x),
    }


def gptq_case(case: Case) -> Outputs:
    given, p = inputs(case), case.params
    w, x = given["w"], given["x"]
    hessian = gptq.Hessian()
    for part in x.chunk(3):
        hessian.update(part)
    solved = gptq.gptq(w, hessian.value, p["bits"], group_of(case), p["sym"], p["act_order"], p["percdamp"])
    nearest = gptq.round_to_nearest(w, p["bits"], group_of(case), p["sym"])
    return {
        "hessian": hessian.value,
        "scale": solved.scale,
        "zero": solved.zero,
        "codes": solved.codes,
        "wq": solved.wq,
        "wq_rtn": nearest.wq,
        "params.output_mse": float((x @ (solved.wq - w).T).square().mean()),
        "params.output_mse_rtn": float((x @ (nearest.wq - w).T).square().mean()),
    }


def integer_nonlinear(case: Case) -> Outputs:
    given, p = inputs(case), case.params
    x, scale = given["x_int"].double(), p["scale"]
    codes, values = integer.log_int_softmax(x, scale, p["bits"])
    softmax_int, softmax_scale = integer.shiftmax(x, scale, p["shiftmax_n"])
    gelu_int, gelu_scale = integer.shift_gelu(x, scale, p["shiftgelu_n"])
    norm_int, norm_scale = integer.integer_layernorm(x, given["ln_weight"], given["ln_bias"], p["sqrt_iterations"])
    return {
        "lis_exp_int": integer.log_int_exp(x, scale),
        "lis_codes": codes,
        "lis_y": values,
        "softmax_float": torch.softmax(x * scale, -1),
        "shiftmax_int": softmax_int,
        "shiftmax_y": softmax_int * softmax_scale,
        "shiftgelu_int": gelu_int,
        "shiftgelu_y": gelu_int * gelu_scale,
        "iln_int": norm_int,
        "iln_scale": norm_scale,
        "iln_y": norm_int * norm_scale,
    }


def log2_softmax(case: Case) -> Outputs:
    p, bits = inputs(case)["prob"], case.params["bits"]
    split, delta = case.params["twin_split"], case.params["sqrt2_delta"]
    codes, zeroed = softmax.log2_encode(p, bits)
    half_codes, half_zeroed = softmax.log_sqrt2_encode(p, delta, bits)
    return {
        "log2_codes": codes,
        "log2_zeroed": zeroed,
        "log2_y": softmax.log2_decode(codes, zeroed),
        "sqrt2_codes": half_codes,
        "sqrt2_y": softmax.log_sqrt2_decode(half_codes, half_zeroed, delta),
        "twin_y": softmax.twin_decode(softmax.twin_encode(p, split, bits), split, bits),
    }


def low_formats(case: Case) -> Outputs:
    w, block = inputs(case)["w"], case.params["block"]
    fp8, fp8_scale = formats.fp8_quantize(w)
    codes, scale, zero = formats.int4_quantize(w, block, symmetric=False)
    sym_codes, sym_scale, _ = formats.int4_quantize(w, block, symmetric=True)
    nvfp4 = formats.nvfp4_quantize(w, case.params["nvfp4_block"])
    return {
        "fp8_scale": fp8_scale,
        "fp8_bytes": formats.e4m3_bytes(fp8),
        "fp8_y": fp8 * fp8_scale,
        "int4_asym_scale": scale,
        "int4_asym_zero": zero,
        "int4_asym_codes": codes,
        "int4_asym_packed": formats.pack_nibbles(codes, block),
        "int4_sym_scale": sym_scale,
        "int4_sym_codes": sym_codes,
        "int4_sym_y": sym_codes * sym_scale.repeat_interleave(block, 1),
        "nvfp4_tensor_scale": nvfp4.tensor_scale,
        "nvfp4_block_scale_bytes": formats.e4m3_bytes(nvfp4.block_scale).squeeze(-1),
        "nvfp4_y": nvfp4.dequantize(),
    }


def mixed_precision(case: Case) -> Outputs:
    p = case.params
    normal = allocation.normalise(case.inputs["sensitivity"], case.inputs["group"], p["bits"])
    budget = allocation.size_budget(case.inputs["size"], p["bits"], p["budget_bits"])
    plan = allocation.allocate(normal, p["bits"], [budget])
    return {"normalised": normal, "assignment_bits": np.array(plan.bits), "params.objective": plan.objective}


def nfds(case: Case) -> Outputs:
    given, p = inputs(case), case.params
    mean, deviation = given["layer_mean"], given["layer_std"]
    removed = sampling.iqr_outliers(mean, deviation, given["category"], p["iqr_factor"], p["min_category"])
    feature = sampling.frame_similarity(given["frame_tokens"])
    found = sampling.noise_filtered_samples(feature, removed, p["clusters"], p["per_cluster"])
    return {
        "removed_iqr": removed,
        "noise_score": sampling.noise_score(mean, deviation),
        "frame_similarity": feature,
        "partition": found.partition,
        "centroids": found.centroids,
        "selected_nearest": found.selected,
    }


def observers(case: Case) -> Outputs:
    x, p = case.inputs["x"].astype(np.float64), case.params
    top, ones = float(np.abs(x).max()), np.ones_like(x)
    width = top / p["kl_bins"]
    histogram, _ = np.histogram(np.abs(x), p["kl_bins"], (0, top))
    threshold, curve = entropy_threshold(histogram, width)
    symmetric = mse_factor(x, ones, -top, top, True, p["bits"], p["mse_p"])
    asymmetric = mse_factor(x, ones, x.min(), x.max(), False, p["bits"], p["mse_p"])
    span = max(x.max(), 0.0) - min(x.min(), 0.0)
    return {
        "min": x.min(),
        "max": x.max(),
        "percentile_abs": [percentile_range(x, q, symmetric=True)[1] for q in p["percentiles"]],
        "percentile_lo": [percentile_range(x, q, symmetric=False)[0] for q in p["percentiles"]],
        "percentile_hi": [percentile_range(x, q, symmetric=False)[1] for q in p["percentiles"]],
        "kl_hist": histogram,
        "kl_curve": curve,
        "kl_bin": round(threshold / width),
        "kl_threshold": threshold,
        "mse_factor_sym": symmetric,
        "mse_scale_sym": symmetric * top / (2 ** (p["bits"] - 1) - 1),
        "mse_factor_asym": asymmetric,
        "mse_scale_asym": asymmetric * span / (2 ** p["bits"] - 1),
    }


def ptf_and_scale_reparam(case: Case) -> Outputs:
    given, p = inputs(case), case.params
    ptf = layernorm.power_of_two_factors(given["x"], p["bits"], p["max_factor"])
    normal = given["norm"] * given["ln_weight"] + given["ln_bias"]
    flat = normal.reshape(-1, normal.shape[-1])
    delta, zero = layernorm.channel_parameters(flat.amin(0), flat.amax(0), p["bits"])
    new = layernorm.reparameterize(
        delta, zero, given["ln_weight"], given["ln_bias"], given["w"], given["bias"], integer_zero=False
    )
    return {
        "ptf_scale1": ptf.scale,
        "ptf_zero": ptf.zero,
        "ptf_factor": ptf.factor,
        "ptf_y": ptf.fake_quantize(given["x"]),
        "repq_delta": delta,
        "repq_zero": zero,
        "repq_ln_weight": new.ln_weight,
        "repq_ln_bias": new.ln_bias,
        "repq_w": new.w,
        "repq_bias": new.bias,
        "repq_target_delta": new.scale,
        "repq_target_zero": new.zero_point,
        "y_fp": (given["norm"] * new.ln_weight + new.ln_bias) @ new.w.T + new.bias,
    }


METHODS: dict[str, Callable[[Case], Outputs]] = {
    "momentum_act_max": momentum_act_max,
    "adaround_cle_biascorr": adaround_cle_biascorr,
    "awq_and_smoothquant": awq_and_smoothquant,
    "channel_balance": channel_balancing,
    "dual_smoothed": dual_smoothed,
    "dynamic_token": dynamic_token,
    "gptq": gptq_case,
    "integer_nonlinear": integer_nonlinear,
    "log2_softmax": log2_softmax,
    "formats": low_formats,
    "mixed_precision": mixed_precision,
    "nfds": nfds,
    "observers": observers,
    "ptf_and_scale_reparam": ptf_and_scale_reparam,
}
