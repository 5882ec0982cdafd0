"""Reading, writing and loading checkpoints."""
