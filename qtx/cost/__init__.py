"""What a model costs to run, beside what else could run it."""
