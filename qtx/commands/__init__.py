"""The commands, one a file: each parses its options, calls one job and prints."""
