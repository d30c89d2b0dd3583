"""Fills a model with the golden recipe's weights and compares module, intermediates and exported ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeattn import create_model, list_models
from edgeattn.errors import UsageError
from edgeattn.export.onnx_model import to_onnx
from edgeattn.models.folding import fuse_attention
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture
from tests.golden import recipe


def model_name(spec: dict[str, Any]) -> str:
    """The zoo's name for a golden file: its own name, or the longest model name that it starts with."""
    names = [name for name in list_models() if spec["name"].startswith(name)]
    return max(names, key=len, default=spec["name"])


def build(spec: dict[str, Any]) -> tuple[torch.nn.Module, list[str]]:
    """The model of a golden file with the recipe's weights, and what is wrong with its state dict."""
    model = create_model(model_name(spec), **spec["config"])
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


def run_module(model: torch.nn.Module, image: np.ndarray, watch: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Output and the intermediates that the golden file names, by upstream module path."""
    seen: dict[str, np.ndarray] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out.numpy()))
        for name in watch
        if name in modules
    ]
    with torch.no_grad():
        logits = model(torch.from_numpy(image)).numpy()
    for hook in hooks:
        hook.remove()
    return {"output": {"logits": logits}, "intermediate": seen}


def run_onnx(model: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    """Logits of the exported model in ONNX Runtime, function bodies inlined."""
    import onnxruntime

    graph = capture(fuse_attention(model), torch.from_numpy(image[:2] if len(image) > 1 else np.repeat(image, 2, 0)))
    fold(graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(to_onnx(graph, image.shape[1:]).SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: image})[0]


def check_file(path: Path, onnx: bool = True) -> list[str]:
    """Everything that differs from one golden file; [] when it agrees."""
    spec = recipe.load_spec(path)
    try:
        model, problems = build(spec)
    except UsageError as error:
        return [str(error)]
    image = recipe.make_inputs(spec)["image"]
    results = run_module(model, image, list(spec.get("intermediate", {})))
    problems += [f"module: {p}" for p in recipe.compare(spec, results["output"])]
    problems += [f"module: {p}" for p in recipe.compare(spec, results["intermediate"], "intermediate")]
    if onnx:
        problems += [f"onnx: {p}" for p in recipe.compare(spec, {"logits": run_onnx(model, image)})]
    return problems
