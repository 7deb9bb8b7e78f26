"""Window attention over a token map in place; the mathematics is in README.md."""
