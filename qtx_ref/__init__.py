"""The reference: what quantized transformer arithmetic means, in NumPy and SciPy alone."""
