"""Scripts that run in the Python environment of a runtime, where this package is not installed."""
