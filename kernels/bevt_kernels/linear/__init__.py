"""A linear layer on CPUs; how it multiplies is in README.md."""
