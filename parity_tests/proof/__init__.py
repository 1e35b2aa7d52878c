"""The table of cases and what runs and judges it. Free of pytest."""
