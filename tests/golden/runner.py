"""Fills a model with the golden recipe's weights and compares module, intermediates and exported ONNX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeattn import create_model, list_models
from edgeattn.data.interface import Interface, interface_of
from edgeattn.errors import EdgeAttnError, UsageError
from edgeattn.export.onnx_model import to_onnx
from edgeattn.models.folding import fuse_attention
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture
from tests.golden import recipe

# Entries of a golden file's config that say how the model was called, not how it is built.
_OF_THE_CALL = ("cfg_scale", "cfg_note")


def model_name(spec: dict[str, Any]) -> str:
    """The zoo's name for a golden file: its own name, or the longest model name that it starts with."""
    names = [name for name in list_models() if spec["name"].startswith(name)]
    return max(names, key=len, default=spec["name"])


def build(spec: dict[str, Any]) -> tuple[torch.nn.Module, list[str]]:
    """The model of a golden file with the recipe's weights, and what is wrong with its state dict."""
    config = {key: value for key, value in spec["config"].items() if key not in _OF_THE_CALL}
    model = create_model(model_name(spec), **config)
    own = model.state_dict()
    problems = []
    if list(own) != list(spec["state_dict"]):
        problems.append(f"state dict keys differ: {sorted(set(own) ^ set(spec['state_dict']))[:8]} or their order")
    problems += [
        f"{key}: shape {list(own[key].shape)}, expected {shape}"
        for key, shape in spec["state_dict"].items()
        if key in own and list(own[key].shape) != shape
    ]
    kept = spec.get("kept", {})
    for key, want in kept.items():
        if recipe.fingerprint(own[key].numpy()) != want:
            problems.append(f"{key}: what the model computed differs from the golden fingerprint")
    parameters = sum(p.numel() for p in model.parameters())
    if parameters != spec["param_count"]:
        problems.append(f"{parameters} parameters, expected {spec['param_count']}")
    filled = {key: torch.from_numpy(value) for key, value in recipe.make_state_dict(spec).items()}
    model.load_state_dict({**{key: own[key] for key in kept}, **filled}, strict=True)
    return model.eval(), problems


def calls_of(spec: dict[str, Any], model: Any) -> dict[str, Any]:
    """How the outputs of a golden file are computed from its inputs: {what: (module to call, inputs)}."""
    inputs = recipe.make_inputs(spec)
    if "cfg_output" in spec["output"]:
        twice = {name: np.concatenate([value, value]) for name, value in inputs.items()}
        twice["y"][len(twice["y"]) // 2 :] = model.num_classes
        return {"model_output": (model, inputs), "cfg_output": (model.guided(spec["config"]["cfg_scale"]), twice)}
    return {"": (model, inputs)}


def run_module(model: torch.nn.Module, spec: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Outputs and the intermediates that the golden file names, by upstream module path, of the first call."""
    seen: dict[str, np.ndarray] = {}
    modules = dict(model.named_modules())
    hooks = [modules[n].register_forward_hook(record(seen, n)) for n in spec.get("intermediate", {}) if n in modules]
    outputs: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, (module, feeds) in calls_of(spec, model).items():
            outputs |= named(module(*(torch.from_numpy(value) for value in feeds.values())), name or "logits")
    for hook in hooks:
        hook.remove()
    return {"output": outputs, "intermediate": seen}


def record(seen: dict[str, np.ndarray], name: str) -> Any:
    """A forward hook that keeps the module's first output."""

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        seen.setdefault(name, output.numpy())

    return hook


def named(result: Any, name: str) -> dict[str, np.ndarray]:
    """A module's result as arrays by name."""
    values = result if isinstance(result, dict) else {name: result}
    return {key: value.numpy() for key, value in values.items()}


def run_onnx(model: torch.nn.Module, spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs of the exported model in ONNX Runtime, function bodies inlined."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    outputs: dict[str, np.ndarray] = {}
    for name, (module, feeds) in calls_of(spec, model).items():
        interface = sized(interface_of(module), feeds)
        graph = capture(fuse_attention(module), interface)
        fold(graph)
        session = onnxruntime.InferenceSession(to_onnx(graph, interface).SerializeToString(), options)
        results = session.run(None, feeds)
        outputs |= dict(zip([name] if name else interface.outputs, results, strict=True))
    return outputs


def sized(interface: Interface, feeds: dict[str, np.ndarray]) -> Interface:
    """The interface with every axis but the batch of the size that the golden file has."""
    inputs = (
        dataclasses.replace(spec, shape=(spec.shape[0], *feeds[spec.name].shape[1:])) for spec in interface.inputs
    )
    return dataclasses.replace(interface, inputs=tuple(inputs))


def check_file(path: Path, module: bool = True, onnx: bool = True) -> list[str]:
    """Everything that differs from one golden file, as a torch module and as exported ONNX; [] when it agrees."""
    spec = recipe.load_spec(path)
    try:
        model, problems = build(spec)
    except UsageError as error:
        return [str(error)]
    if module:
        results = run_module(model, spec)
        problems += [f"module: {p}" for p in recipe.compare(spec, results["output"])]
        problems += [f"module: {p}" for p in recipe.compare(spec, results["intermediate"], "intermediate")]
    if onnx:
        try:
            problems += [f"onnx: {p}" for p in recipe.compare(spec, run_onnx(model, spec))]
        except EdgeAttnError as error:
            problems.append(f"onnx: {error}")
    return problems
