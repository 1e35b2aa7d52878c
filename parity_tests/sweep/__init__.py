"""Random configurations of the integer arithmetic, to the bit."""
