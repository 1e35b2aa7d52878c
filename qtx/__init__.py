"""qtx: train transformers that survive integers, quantize them, and prove that what runs is what was measured."""

__version__ = "0.2.0"
