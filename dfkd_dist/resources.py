"""Where the shipped files are: the recipes and the launch programs, in a checkout and in an installed wheel.

A checkout keeps them beside the package, in ``configs/`` and ``launch/``. A wheel carries the recipes inside
the package (``dfkd_dist/configs``) and the launch programs beside it, as ``dfkd_launch``.
"""

from importlib.resources import files
from pathlib import Path


def configs_dir() -> Path:
    """Return the folder of the shipped recipes.

    Raises:
        FileNotFoundError: the installation holds none; the message names the places looked at.
    """
    return _find("configs", packaged=_package() / "configs")


def launch_dir() -> Path:
    """Return the folder of the launch programs and of their accelerate and DeepSpeed configs.

    Raises:
        FileNotFoundError: the installation holds none; the message names the places looked at.
    """
    return _find("launch", packaged=_package().parent / "dfkd_launch")


def _package() -> Path:
    return Path(str(files("dfkd_dist")))


def _find(name: str, packaged: Path) -> Path:
    root = _package().parent
    places = [packaged]
    if (root / "pyproject.toml").is_file():  # else the neighbours in site-packages belong to others
        places.append(root / name)
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"the {name} folder of dfkd-dist is missing (looked at: {looked}); "
        "install the wheel with pip, or install the checkout with `make .venv` or `pip install -e .`"
    )
