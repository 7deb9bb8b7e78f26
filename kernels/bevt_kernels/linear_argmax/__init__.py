"""The largest output of a linear layer, without the outputs; the mathematics is in README.md."""
