"""Reports of sizes, costs and checks of a compression."""
