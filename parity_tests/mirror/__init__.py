"""Cases that hold torch to the reference."""
