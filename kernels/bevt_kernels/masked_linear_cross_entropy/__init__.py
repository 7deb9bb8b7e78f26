"""A linear layer and its cross-entropy over selected rows; the mathematics is in README.md."""
