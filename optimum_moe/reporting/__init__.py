"""What a compression costs and gives, for people to read."""
