# SPDX-License-Identifier: Apache-2.0
"""Pictures: principal components of user vectors against a singular value decomposition, `embed
--plot` from the command line; losses, and NDCG by length, as points one by one."""

import math

import numpy as np
import polars as pl
import pytest
from builders import recipe, run, synthetic

from fastrec.cli import main
from fastrec.data.output import new_file
from fastrec.evaluation import report
from fastrec.evaluation.report import plot_by_length, plot_losses, plot_plane
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


@pytest.fixture
def lines(monkeypatch):
    """The points of each line by its label."""
    found, finish = {}, report._finish

    def read(figure, axes, path):
        for line in axes.lines:
            x, y = line.get_data()
            found[line.get_label()] = list(zip(x, y.tolist(), strict=True))
        finish(figure, axes, path)

    monkeypatch.setattr(report, "_finish", read)
    return found


def test_losses_are_drawn_by_step_and_a_resumed_run_says_the_last(tmp_path, lines):
    def log(run, version, *rows):
        file = tmp_path / run / "metrics" / f"version_{version}" / "metrics.csv"
        file.parent.mkdir(parents=True)
        file.write_text("epoch,step,train_loss\n" + "\n".join(rows))

    log("one", 0, "0,9,5.5", "0,19,4.25", "1,29,4.0", "1,39,")  # the last line was cut
    log("one", 1, "1,29,3.5", "1,39,3.25")
    log("other", 0, "0,4,2.5")
    runs = {"first": tmp_path / "one", "second": tmp_path / "other", "none": tmp_path / "nowhere"}
    plot_losses(runs, tmp_path / "loss.png")
    assert lines == {
        "first": [(9, 5.5), (19, 4.25), (29, 3.5), (39, 3.25)], "second": [(4, 2.5)], "none": [],
    }  # fmt: skip
    assert is_png(tmp_path / "loss.png")


def test_ndcg_is_drawn_by_groups_of_users_of_equal_size(tmp_path, lines):
    """Edges of sixths of the users: 1, 3, 5, 6, 8, 10, 12."""
    lengths = np.array([12, *range(1, 12)])
    best, second, tenth = 1.0, 1 / math.log2(3), 1 / math.log2(11)
    ranks = np.array([1, 1, 2, 10, 11, 1, 2, 2, 1.5, 400, 10, 10])  # of 12, 1, 2, 3, ...
    plot_by_length(lengths, {"a": ranks, "b": np.full(12, 11)}, tmp_path / "length.png")
    labels = ["1-2", "3-4", "5-5", "6-7", "8-9", "10-12"]
    gains = [
        (best + second) / 2, (tenth + 0) / 2, best, second, (1 / math.log2(2.5) + 0) / 2,
        (2 * tenth + best) / 3,
    ]  # fmt: skip
    assert [x for x, _ in lines["a"]] == labels and lines["b"] == [(x, 0.0) for x in labels]
    assert [y for _, y in lines["a"]] == pytest.approx(gains)
    assert is_png(tmp_path / "length.png")


def test_users_of_one_length_are_one_group(tmp_path, lines):
    plot_by_length(np.full(4, 7), {"a": np.array([1, 1, 20, 30])}, tmp_path / "length.png")
    assert lines == {"a": [("7-7", 0.5)]}
