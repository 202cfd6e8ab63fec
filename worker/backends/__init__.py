"""Kernels behind one interface: ``cpu`` is plain torch and the reference."""
