"""What is measured of a model: scores, outliers, heads."""
