"""Torch graph to ONNX, graph checks, one module per target, and the bundle writer."""
