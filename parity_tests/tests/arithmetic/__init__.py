"""Quantizers, integers and the small formats."""
