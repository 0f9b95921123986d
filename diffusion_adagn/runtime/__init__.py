"""The machine: devices, precision, compilation, processes, signals."""
