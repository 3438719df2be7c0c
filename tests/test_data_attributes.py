# SPDX-License-Identifier: Apache-2.0
"""User attributes as targets: standardised by the training users, classes, missing values."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastrec.data.attributes import Attribute, encode_attributes, profile_ids
from fastrec.data.errors import DataError


class Users:
    """Stands for a data set: only the attribute table is read."""

    path = Path("memory")

    def __init__(self, **columns):
        count = len(next(iter(columns.values())))
        self.frame = pl.DataFrame({"user": range(count), "user_id": range(count), **columns})

    def user_attributes(self):
        return self.frame


def encode(attribute: Attribute, values, users):
    (encoded,) = encode_attributes(Users(**{attribute.name: values}), [attribute], users)
    return encoded


def test_numbers_are_standardised_by_the_training_users():
    encoded = encode(Attribute("age", range=(20, 70)), [10.0, 30.0, None, 90.0], [0, 1, 2])
    assert (encoded.mean, encoded.std) == (20.0, 10.0)
    assert encoded.values[[0, 1, 3]].tolist() == [-1, 1, 7] and encoded.values[2].isnan()
    assert encoded.known([0, 2]).tolist() == [True, False]
    assert encoded.outputs == 1 and encoded.unit == 10 / 50


@pytest.mark.parametrize("missing", [0, 3])
def test_fifty_integers_are_classes_whether_some_are_missing_or_not(missing):
    values = [*range(50), *[None] * missing]
    assert encode(Attribute("age"), values, range(50)).outputs == 50
    assert encode(Attribute("age"), [*range(51), *[None] * missing], range(50)).outputs == 1


def test_logarithm_and_integers():
    encoded = encode(Attribute("plays", log=True), [0, 9, 99], [0, 1, 2])
    z = np.log1p([0, 9, 99])
    np.testing.assert_allclose(encoded.values, (z - z.mean()) / z.std(), rtol=1e-6)


def test_bins_have_closed_lower_edges():
    encoded = encode(Attribute("reviews", bins=[8, 15]), [7, 8, 14, 15, None], [0])
    assert encoded.values.tolist() == [0, 1, 1, 2, -1]
    assert encoded.labels == ("< 8", "8 - 15", ">= 15") and encoded.outputs == 3


def test_classes_come_from_the_training_users():
    encoded = encode(Attribute("region"), ["b", "a", None, "b", "c"], [0, 1, 2, 3])
    assert encoded.labels == ("a", "b")
    assert encoded.values.tolist() == [1, 0, -1, 1, -1]  # nobody in training is from c


def test_the_most_frequent_values_and_the_others():
    values = [5, 5, 5, 2, 2, 9, 1, None]
    encoded = encode(Attribute("tag", top=2), values, range(6))
    assert encoded.labels == (2, 5, "other")
    assert encoded.values.tolist() == [1, 1, 1, 0, 0, 2, 2, -1]
    ties = encode(Attribute("tag", top=2), [9, 9, 5, 5, 2, 2, 1, 7, 7], range(9))
    assert ties.labels == (2, 5, "other"), "of equally frequent ones the smallest"
    assert ties.values.tolist() == [2, 2, 1, 1, 0, 0, 2, 2, 2]


def test_without_a_list_every_column_is_taken_by_its_type():
    count = 60
    table = Users(
        stars=np.linspace(1, 5, count),
        plays=np.arange(count),
        gender=["m", "f"] * (count // 2),
        active=[True, False] * (count // 2),
        level=np.arange(count) % 3,
    )
    kinds = {a.name: a.outputs for a in encode_attributes(table, [], range(count))}
    assert kinds == {"stars": 1, "plays": 1, "gender": 2, "active": 2, "level": 3}


def test_equal_profiles_have_equal_ids():
    table = Users(a=["x", "x", "y", "x", None], b=[1, 1, 1, 2, 1], c=[0.5, 0.1, 0.2, 0.3, 0.4])
    ids = profile_ids(encode_attributes(table, [], range(5)))
    assert ids[0] == ids[1] and len(set(ids[:4])) == 3 and ids[4] == -1
    assert profile_ids(encode_attributes(table, [Attribute("c")], range(5))) is None


@pytest.mark.parametrize(
    ("attribute", "values", "message"),
    [
        (Attribute("b"), [1, 2], r"column 'b': column is missing; the attributes are \['a'\]"),
        (Attribute("a"), [1.0, 1.0], "is constant for all training users"),
        (Attribute("a"), [0.1] * 50, "is constant for all training users"),  # std() is 2.8e-17
        (Attribute("a"), [None, None, 1.0], "is missing for all training users"),
        (Attribute("a"), [1.0, float("inf")], "row 2: inf is not finite"),
        (Attribute("a", log=True), [0, -3], r"row 2: log\(1 \+ -3\) is not finite"),
        (Attribute("a", kind="numeric"), ["x", "y"], "is String, not numeric"),
        (Attribute("a"), ["x", "x"], "fewer than two classes"),
        (Attribute("a"), [[1], [2]], r"List\(Int64\) cannot be predicted"),
        (Attribute("a"), [str(i) for i in range(1001)], "has 1001 different values; `top` keeps"),
    ],
)
def test_errors_name_the_column(attribute, values, message):
    users = range(2) if len(values) < 1000 else range(1001)
    with pytest.raises(DataError, match=message):
        encode_attributes(Users(a=pl.Series(values, strict=False)), [attribute], users)


def test_any_name_and_missing_numbers_in_classes():
    (counted,) = encode_attributes(
        Users(count=pl.Series([1, 1, 2])), [Attribute("count")], range(3)
    )
    assert counted.labels == (1, 2)
    values = pl.Series([1.0, float("nan"), 2.0])
    (part,) = encode_attributes(Users(a=values), [Attribute("a", kind="discrete")], range(3))
    assert part.labels == (1.0, 2.0) and part.values.tolist() == [0, -1, 1]
    with pytest.raises(ValueError, match=r"attribute 'a': range must ascend, got \(5, 5\)"):
        Attribute("a", range=(5, 5))


def test_no_attributes_at_all():
    table = Users(a=[1])
    table.frame = table.frame.drop("a")
    with pytest.raises(DataError, match="prepare the data set with --user_attributes"):
        encode_attributes(table, [], [0])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(bins=[4, 5], log=True), "log has no effect beside bins"),
        (dict(top=3, log=True), "log has no effect beside top"),
        (dict(bins=[4, 5], range=(0, 9)), "range has no effect beside bins"),
        (dict(kind="discrete", range=(0, 9)), "range has no effect beside kind: discrete"),
        (dict(bins=[4, 5], top=3), "top has no effect beside bins"),
        (dict(log=True, range=(-1, 9)), "with log its range must begin above -1"),
    ],
)
def test_what_has_no_effect_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"attribute 'a': {message}"):
        Attribute("a", **settings)


def test_a_range_of_classes_is_refused():
    with pytest.raises(DataError, match="column 'a': holds classes, for which range has no effect"):
        encode(Attribute("a", range=(0, 9)), [1, 2, 1], [0, 1, 2])


def test_errors_of_a_logarithm_are_of_its_range():
    encoded = encode(Attribute("plays", log=True, range=(0, 99)), [0, 9, 99], [0, 1, 2])
    assert encoded.unit * np.ptp(encoded.values.numpy()) == pytest.approx(1)
