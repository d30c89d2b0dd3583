"""A model read from an ONNX file, as a torch module of standard operators."""
