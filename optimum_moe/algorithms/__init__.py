"""Pure functions on tensors: torch and scipy only."""
