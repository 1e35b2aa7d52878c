"""What engines compute, and why two of them differ."""
