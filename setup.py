"""The packages, and configs/ as one more: a wheel holds the recipes as diffusion_adagn/configs. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["diffusion_adagn*"]), "diffusion_adagn.configs"],
    package_dir={"diffusion_adagn.configs": "configs"},
    package_data={
        "diffusion_adagn": [
            "py.typed",
            "data/*.tsv",
            "ops/*.cpp",
            "pretrained/**/*.*",
            "serving/page/*.[cj]s*",
            "render/*.[cj]*",
            "trace/*.j2",
        ],
        "diffusion_adagn.configs": ["*.yaml", "*.json"],
    },
)
