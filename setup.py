"""What pyproject.toml cannot spell: launch/ ships as dfkd_launch, and configs/ as data inside dfkd_dist."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["dfkd_dist", "dfkd_dist.*"]),
        "dfkd_dist.configs",
        "dfkd_launch",
        *(f"dfkd_launch.{name}" for name in find_packages("launch")),
    ],
    package_dir={"dfkd_dist.configs": "configs", "dfkd_launch": "launch"},
)
