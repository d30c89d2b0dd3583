"""Post-training quantization methods as pure functions on tensors; each keeps the floating-point type of its input."""
