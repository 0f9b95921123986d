"""Inspecting the conditioning: the modulation of every site, and how the output changes when it is edited."""
