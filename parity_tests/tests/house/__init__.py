"""The house itself: interfaces, imports, the checker."""
