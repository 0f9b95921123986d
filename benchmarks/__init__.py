"""What this package's network costs in time and memory, side by side with others: python -m benchmarks.compare --help.

Not installed with the package; run from the top of the repository. benchmarks/README.md says what a figure means.
"""
