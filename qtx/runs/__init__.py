"""A run is a file: what it may say, the published ones, and how files and options lie over one another."""
