"""Devices, precision, compilation, processes and signals."""
