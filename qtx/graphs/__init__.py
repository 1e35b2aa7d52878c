"""Models as ONNX files: reading and walking those of other tools, writing our own."""
