"""Argument parsing only; the work is done elsewhere. Nothing heavy is imported before the arguments are understood."""
