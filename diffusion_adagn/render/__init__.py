"""Grids of images; the only folder that draws."""
