"""Long proofs and reports, each a command: python -m parity_tests.long.NAME."""
