"""Where two executions of one quantized model part, and by which rule."""
