"""Measurements: whole steps beside their peers, kernels beside their rooflines, emulated counts."""
