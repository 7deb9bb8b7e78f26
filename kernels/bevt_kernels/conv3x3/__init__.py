"""A 3x3 convolution on CPUs by Winograd's minimal filtering; the mathematics is in README.md."""
