"""From a float model to a quantized one: transforms, ranges, rewritten weights."""
