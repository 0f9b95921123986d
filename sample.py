"""python sample.py ... is `adagn sample ...`: accelerate launch and torchrun take a file."""

from diffusion_adagn.cli.main import script

if __name__ == "__main__":
    script("sample")
