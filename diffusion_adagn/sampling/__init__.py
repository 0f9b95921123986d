"""Samplers, guidance, class mixing, the pipeline, and images into a folder."""
