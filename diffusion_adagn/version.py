"""The version of the package. Modules inside the package read it here; importing `diffusion_adagn` itself would be a cycle."""

__version__ = "0.1.0"
