"""Layers in terms of a backend's kernels and the communicator; sizes come from ParameterSpecs."""
