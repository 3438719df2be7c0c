"""What bad input meets: the one error of the data path names the file, the column and the row."""


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
