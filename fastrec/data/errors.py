"""What bad input meets: the one error of the data path, which names the file, the column and the
row, and the check of settings that are one of a few choices."""

from typing import Literal, get_args, get_origin, get_type_hints


class DataError(ValueError):
    """Bad input. The message reads `file: column 'x', row n: problem`.

    file: the file (or directory) at fault. column: its column, or None.
    row: 1-based line of a text file (the header counts), 1-based row of a Parquet file, or None.
    """

    def __init__(self, file, problem: str, *, column: str | None = None, row: int | None = None):
        where = [f"column {column!r}"] if column is not None else []
        where += [f"row {row}"] if row is not None else []
        super().__init__(f"{file}: " + (", ".join(where) + ": " if where else "") + problem)
        self.file, self.column, self.row, self.problem = str(file), column, row, problem

    def __reduce__(self):
        return _rebuild, (self.file, self.problem, self.column, self.row)


def _rebuild(file, problem, column, row):
    return DataError(file, problem, column=column, row=row)


def check_choices(config) -> None:
    """Raise ValueError for a field annotated Literal[...] (or None) that holds something else."""
    for name, hint in get_type_hints(type(config)).items():
        parts = [hint] if get_origin(hint) is Literal else list(get_args(hint))
        allowed = [value for part in parts for value in get_args(part)]
        if any(get_origin(part) is not Literal and part is not type(None) for part in parts):
            continue
        value = getattr(config, name)
        if parts and value not in allowed and not (value is None and type(None) in parts):
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
