"""Launches of Triton for experts that differ in size; imported only where there is a device that runs them."""
