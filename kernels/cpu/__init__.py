"""Compiled kernels for CPUs with AMX."""
