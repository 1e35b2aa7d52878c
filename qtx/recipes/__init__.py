"""Recipes: which site is quantized and how, and the sites there are."""
