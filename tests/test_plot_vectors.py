# SPDX-License-Identifier: Apache-2.0
"""The picture of user vectors: principal components against a singular value decomposition, and
`embed --plot` from the command line."""

import numpy as np
import polars as pl
import pytest
from builders import recipe, run, synthetic

from fastrec.cli import main
from fastrec.data.output import new_file
from fastrec.evaluation import report
from fastrec.evaluation.report import plot_plane
from fastrec.vectors import principal_components


def is_png(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_principal_components_are_those_of_a_singular_value_decomposition():
    vectors = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * [5, 3, 2, 1, 1, 1]
    points, shares = principal_components(vectors + 7)
    centred = vectors - vectors.mean(0)
    _, size, directions = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(shares, size[:2] ** 2 / (size**2).sum(), rtol=1e-5)
    for place in (0, 1):
        expected = centred @ directions[place] * np.sign(directions[place][
            np.abs(directions[place]).argmax()
        ])  # fmt: skip
        np.testing.assert_allclose(points[:, place], expected, atol=1e-4)
    same, shares = principal_components(np.ones((4, 3), np.float32))
    assert not same.any() and not shares.any(), "a collapse is a point"
    with pytest.raises(ValueError, match=r"a plane needs 2 vectors of 2 numbers, got \[1, 6\]"):
        principal_components(vectors[:1])


@pytest.fixture
def drawn(monkeypatch):
    """(label, number of points) of what is drawn."""
    found = []

    def finish(figure, axes, path):
        found.extend((c.get_label(), len(c.get_offsets())) for c in axes.collections)
        with new_file(path) as work:
            figure.savefig(work)

    monkeypatch.setattr(report, "_finish", finish)
    return found


POINTS, SHARES = np.arange(30.0).reshape(15, 2), np.array([0.5, 0.25])


def test_values_have_a_colour_each_and_the_rest_one(tmp_path, drawn):
    letters = pl.Series([*"aaabbcdefghij", None, None])
    plot_plane(POINTS, SHARES, tmp_path / "a.png", "letter", letters)
    assert drawn[0] == ("unknown", 2) and drawn[1] == ("other", 1)  # j, the tenth
    assert drawn[2:4] == [("a", 3), ("b", 2)] and len(drawn) == 11
    drawn.clear()
    plot_plane(POINTS, SHARES, tmp_path / "b.png", "few", pl.Series([1, 2, 2] * 5))
    assert drawn == [("2", 10), ("1", 5)]


def test_numbers_have_a_scale_and_many_users_are_sampled(tmp_path, drawn, monkeypatch):
    numbers = pl.Series([float("nan"), None, *np.arange(13.0)], strict=False)
    plot_plane(POINTS, SHARES, tmp_path / "a.png", "number", numbers)
    assert drawn == [("unknown", 2), ("known", 13)]
    drawn.clear()
    monkeypatch.setattr(report, "_DRAWN", 4)
    plot_plane(POINTS, SHARES, tmp_path / "b.png")
    assert drawn == [("4 of 15 users", 4)] and is_png(tmp_path / "b.png")


def test_embed_draws_users(tmp_path, capsys):
    data = synthetic(tmp_path, num_users=60)
    run(data, tmp_path / "run", recipe(steps=2, validate_every=2))
    flags = [f"--data={data}", f"--pretrained={tmp_path / 'run' / 'model'}"]
    picture, output = tmp_path / "users.png", tmp_path / "users.parquet"
    main(["embed", *flags, f"--output={output}", f"--plot={picture}", "--color_by=region"])
    assert is_png(picture) and pl.read_parquet(output).height == 60
    assert f"plot: {picture}" in capsys.readouterr().out
    users = tmp_path / "ids.txt"
    users.write_text("7\n3\n12\n")
    again = ["embed", *flags, f"--output={tmp_path / 'b.parquet'}", f"--users={users}"]
    for more, message in [
        (["--color_by=region"], "--color_by has no effect without --plot"),
        ([f"--plot={picture}"], "users.png is there already; --overwrite true replaces it"),
        (["--plot=x.jpg"], "x.jpg: a plot is written to a .png file"),
        (["--plot=x.png", "--color_by=regio"], "'regio': column is missing; the attributes are"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main([*again, *more])
    assert not (tmp_path / "b.parquet").exists()
    with pytest.raises(SystemExit, match="--plot has no effect on --what items"):
        main(
            ["embed", *flags, f"--output={tmp_path / 'i.parquet'}", "--what=items", "--plot=a.png"]
        )
    main([*again, f"--plot={tmp_path / 'b.png'}", "--color_by=mean_rating"])
    assert is_png(tmp_path / "b.png")
