"""Recipes: one named composition per system. `path("uprec-mip")` is its YAML file."""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def path(name_or_file: str) -> Path:
    """The YAML file of a recipe name, or the file itself.

    Raises FileNotFoundError that lists the recipes.
    """
    for candidate in (Path(name_or_file), FOLDER / f"{name_or_file}.yaml"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{name_or_file!r} is neither a file nor a recipe; the recipes are {', '.join(names())}"
    )
