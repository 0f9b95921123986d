"""Personalization: a new class from a few images, and the pipeline that has it."""
