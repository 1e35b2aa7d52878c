"""Integers alone: exact products, requantization, and a whole model in codes."""
