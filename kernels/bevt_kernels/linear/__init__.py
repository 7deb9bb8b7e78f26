"""A linear layer on CPUs."""
