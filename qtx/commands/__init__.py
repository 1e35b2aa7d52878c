"""The commands: each parses, calls one job and prints."""
