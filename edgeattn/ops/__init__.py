"""Attention ops: one file each with numpy reference, ONNX function body, shape rule and torch custom op.

Importing the package is cheap; `registry.load_ops()` imports the op files (and torch with them).
"""
