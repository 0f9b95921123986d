"""Time and memory of this package's network, compared with others: python -m benchmarks.compare --help.

Not installed with the package; run from the top of the repository. benchmarks/README.md explains the numbers.
"""
