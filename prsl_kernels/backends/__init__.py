"""Interchangeable kernels behind the operators of :mod:`prsl_kernels.ops`; none knows another."""
