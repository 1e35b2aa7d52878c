"""Quantized models as ONNX graphs: written from an artifact."""
