"""Quantized models as ONNX graphs: written from an artifact; those of other tools read and walked."""
