# SPDX-License-Identifier: Apache-2.0
"""Times: exact, or refused in one line; never a guess."""

import datetime
from decimal import Decimal

import polars as pl
import pytest
from files import rows, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.data.errors import DataError
from fastrec.data.prepare import readers
from fastrec.data.prepare.epochs import epoch_column

NAMES = {"user": "who", "item": "what", "timestamp": "when"}


def test_iso_times_and_datetimes(tmp_path):
    text = "who,what,when\n1,1,2020-01-01 00:00:01\n1,2,2020-01-01 00:00:00.5\n"
    file = write(tmp_path / "t.csv", text)
    first, second = (row[2] for row in rows(readers.read_table(file, **NAMES)))
    assert first - second == 500_000
    frame = pl.DataFrame(
        {"who": [1], "what": ["x"], "when": [datetime.datetime(2020, 1, 1, 0, 0, 1)]}
    )
    frame.write_parquet(tmp_path / "t.parquet")
    assert rows(readers.read_table(tmp_path / "t.parquet", **NAMES)) == [(1, "x", first)]


def times(tmp_path, values, **options):
    file = write(
        tmp_path / "t.tsv", "\n".join(["who\twhat\twhen", *(f"1\t2\t{v}" for v in values)])
    )
    raw = readers.read_table(file, on_duplicate="keep", **NAMES, **options)
    return raw.interactions["timestamp"].to_list(), raw.time


SECOND = 1_000_000
DAY = 86_400 * SECOND
MICRO, NANO = "microseconds since 1970", "nanoseconds since 1970"


@pytest.mark.parametrize(
    ("values", "expected", "unit"),
    [
        (["1970-01-02", "1970-01-01T00:00:01"], [DAY, SECOND], MICRO),
        (["1970-01-01 00:00:01.000001", "1969-12-31T23:59:59.5"], [SECOND + 1, -500_000], MICRO),
        (["1970-01-01T00:00:00.000000002", "1970-01-01"], [2, 0], NANO),
        (["1970-01-01T01:00:00Z", "1970-01-01T01:00+01:00", "1970-01-01T00:00-0030"],
         [3600 * SECOND, 0, 1800 * SECOND], MICRO),
        (["0001-01-01", "9999-12-31"], [-719_162 * DAY, 2_932_896 * DAY], MICRO),
        # Beside a number that a float wrote, the others stay as they are: 256 ns apart as floats.
        (["1706695200000000100", "1706695200000000200.0", "1.7066952e18"],
         [1706695200000000100, 1706695200000000200, 1706695200000000000], NANO),
        (["-5", "0"], [-5, 0], "timestamp of the source"),
    ],
)  # fmt: skip
def test_times_of_text(tmp_path, values, expected, unit):
    assert times(tmp_path, values) == (expected, unit)


@pytest.mark.parametrize(
    ("values", "row"),
    [
        (["01/05/2024"], 2), (["5.1.2024"], 2), (["2024-1-5"], 2), (["2024-01-05 10:00 PM"], 2),
        (["2024-01-01T23:00:00+99:99"], 2), (["2024-01-01T23:00:00+05:75"], 2),
        (["2024-02-30"], 2), (["2024-01-01T24:01"], 2), (["2024-01-01", "20240102"], 3),
        (["2024-01-01T00:00Z", "2024-01-01T00:00"], 3), (["2024-01-01T00:00:00.0000000001"], 2),
        (["1", "007"], 3), (["1", "+7"], 3), (["1", "1_0"], 3), (["1", "1.5"], 3),
        (["1", "1e999999999"], 3), (["1", "nan"], 3), (["1", "\uff17"], 3), (["1", " 2"], 3),
        (["1", "9223372036854775808"], 3), (["9999-12-31", "2024-01-01T00:00:00.000000001"], 2),
    ],
)  # fmt: skip
def test_times_that_would_be_a_guess_or_lose_something(tmp_path, values, row):
    with pytest.raises(DataError, match="expected") as caught:
        times(tmp_path, values)
    assert (caught.value.column, caught.value.row) == ("when", row)


def test_a_format_of_times(tmp_path):
    us = ["01/05/1970", "02/03/1970 00:00"]
    assert times(tmp_path, us[:1], time_format="%m/%d/%Y") == ([4 * DAY], MICRO)
    with pytest.raises(DataError, match=r"row 3: .* follows --time_format '%m/%d/%Y'"):
        times(tmp_path, us, time_format="%m/%d/%Y")
    fine = ["01.01.1970 00:00:00.000000007"]
    assert times(tmp_path, fine, time_format="%d.%m.%Y %H:%M:%S%.f") == ([7], NANO)
    parts = [f"01.01.1970 00:00:00.{part}" for part in ("5", "25", "125")]
    for point in (".%f", "%.f"):
        found = times(tmp_path, parts, time_format=f"%d.%m.%Y %H:%M:%S{point}")
        assert found == ([500_000, 250_000, 125_000], MICRO)
    assert times(tmp_path, ["%f 01.01.1970"], time_format="%%f %d.%m.%Y")[0] == [0]
    with pytest.raises(ValueError, match=r"%f stands behind a point, as in %S\.%f"):
        times(tmp_path, ["01.01.1970 000000500"], time_format="%d.%m.%Y %H%M%S%f")
    with pytest.raises(ValueError, match=r"the name of a zone \(%Z\) does not say how far"):
        times(tmp_path, ["01.01.1970 01:50 EDT"], time_format="%d.%m.%Y %H:%M %Z")
    assert times(tmp_path, ["31.12.9999"], time_format="%d.%m.%Y") == ([2_932_896 * DAY], MICRO)
    with pytest.raises(ValueError, match="has no year"):
        times(tmp_path, ["10:00"], time_format="%H:%M")
    file = tmp_path / "t.parquet"
    pl.DataFrame({"who": [1], "what": [2], "when": [3]}).write_parquet(file)
    with pytest.raises(DataError, match="--time_format is for text, the column is Int64"):
        readers.read_table(file, time_format="%Y", **NAMES)


def test_times_of_parquet(tmp_path):
    def read(values, dtype):
        frame = pl.DataFrame(
            {"who": [1, 1], "what": [1, 2], "when": pl.Series(values, dtype=dtype)}
        )
        frame.write_parquet(tmp_path / "t.parquet")
        raw = readers.read_table(tmp_path / "t.parquet", **NAMES)
        return raw.interactions["timestamp"].to_list(), raw.time

    assert read([900, 100], pl.Datetime("ns")) == ([900, 100], NANO)
    assert read([9000, 1000], pl.Datetime("ns")) == ([9, 1], MICRO)
    assert read([9, 1], pl.Datetime("ms", "Europe/Oslo")) == ([9000, 1000], MICRO)
    assert read([2, 1], pl.Date) == ([2 * DAY, DAY], MICRO)
    assert read([2.0, 1.0], pl.Float64)[0] == [2, 1]
    for values, dtype, match in (
        ([1.7e18, 1.0], pl.Float64, "beyond it times are rounded"),
        ([1.7e9, 1.0], pl.Float32, "beyond it times are rounded"),
        ([1.0, 1.5], pl.Float64, "a whole number"),
        ([2**62, 1], pl.Datetime("ms"), "fit 64 bits"),
        ([1, 2], pl.Time, "expected times"),
    ):
        with pytest.raises(DataError, match=match):
            read(values, dtype)


def test_times_of_recbole_are_read_as_they_are_written(tmp_path):
    head = "user_id:token\titem_id:token\ttimestamp:float\n"
    file = write(
        tmp_path / "a.inter", head + "1\t2\t1706695200000000900\n1\t3\t1706695200000000100\n"
    )
    raw = readers.read_recbole(file)
    assert raw.interactions["timestamp"].to_list() == [1706695200000000900, 1706695200000000100]


# Numbers


DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
WORDS = ("seconds", "milliseconds", "microseconds", "nanoseconds")


@pytest.mark.parametrize("unit", DIGITS)
@pytest.mark.parametrize("kind", ["text", "integers", "floats"])
def test_the_unit_of_numbers_is_inferred_from_1990_to_2100(tmp_path, unit, kind):
    """Where one time is outside, none is; a unit that is said is taken for all years."""
    scale = 10 ** DIGITS[unit]
    inside = [631_152_000 * scale, 4_102_444_800 * scale - 1]
    if kind == "floats" and unit == "ns":
        return  # beyond 2**53 floats are rounded
    for values, known in ((inside, True), ([inside[0] - 1, inside[1]], False),
                          ([inside[0], inside[1] + 1], False)):  # fmt: skip
        if kind == "text":
            found, time = times(tmp_path, values)
        else:
            dtype = pl.Int64 if kind == "integers" else pl.Float64
            when = pl.Series(values, dtype=dtype)
            raw = readers.read_table(pl.DataFrame({"user": [1, 1], "item": [1, 2], "time": when}))
            found, time = raw.interactions["timestamp"].to_list(), raw.time
            assert raw.inferred.get("time_unit") == (unit if known else None)
        assert found == values
        words = f"{WORDS[DIGITS[unit] // 3]} since 1970"
        assert time == (words if known else "timestamp of the source")
        assert times(tmp_path, values, time_unit=unit) == (values, words)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(-(10**10), 10**11), st.integers(0, 9), st.integers(0, 10**9 - 1)),
        min_size=1, max_size=5,
    ),
    st.sampled_from(list(DIGITS)),
    st.booleans(),
)  # fmt: skip
def test_fractions_are_exact_in_a_finer_unit(values, unit, typed):
    numbers = []
    for whole, digits, fraction in values:
        # A double holds any 15 digits, 12 of which may stand before the point.
        digits = min(digits, 9 - DIGITS[unit], 3 if typed else 9)
        numbers.append(Decimal(whole) + Decimal(fraction % 10**digits) / 10**digits)
    finest = max(-min(0, number.normalize().as_tuple().exponent) for number in numbers)
    place = -(-(DIGITS[unit] + finest) // 3) * 3
    expected = [int(number * 10 ** (place - DIGITS[unit])) for number in numbers]
    if typed:
        series = pl.Series("t", [float(number) for number in numbers])
    else:
        series = pl.Series("t", [f"{number:f}" for number in numbers])
    if any(abs(value) >= 2**63 // 2 for value in expected):
        return
    found, words, inferred = epoch_column("f", series, 1, unit)
    assert found.to_list() == expected and words == f"{WORDS[place // 3]} since 1970"
    assert inferred is None


@pytest.mark.parametrize(
    ("values", "options", "row", "match"),
    [
        (["1.5", "2"], {}, 2, "whole number .* got '1.5'; --time_unit says"),
        (["1565457600.123", "1565457600.1234567891"], {}, 3, "nanosecond at most"),
        (["1565457600000"], {"time_unit": "s"}, 2, "of the years 1 to 9999 in s"),
        (["1700000000", "1700000000000"], {}, 3, "dates in s or in ms: bring them to one unit"),
        (["1700000000000.5", "1700000000"], {}, 2, "dates in s or in ms"),
        (["2024-01-31"], {"time_unit": "s"}, None, "--time_unit is for numbers"),
        (["1565457600", "2024-01-31"], {}, 3, "a whole number"),
        (["9300000000", "1.1234567"], {"time_unit": "s"}, 2, "fits 64 bits in nanoseconds"),
    ],
)
def test_numbers_that_are_no_times(tmp_path, values, options, row, match):
    with pytest.raises(DataError, match=match) as caught:
        times(tmp_path, values, **options)
    assert (caught.value.column, caught.value.row) == ("when", row)


def test_numbers_beside_dates_only_order_events(tmp_path):
    for values in ([0, 1_700_000_000], [1_700_000_000, 5_000_000_000, 1_700_000_000_000]):
        assert times(tmp_path, values) == (values, "timestamp of the source")


def test_units_are_checked(tmp_path):
    with pytest.raises(ValueError, match="time_unit must be one of s, ms, us, ns, got 'minutes'"):
        times(tmp_path, ["1"], time_unit="minutes")
    with pytest.raises(ValueError, match="not both"):
        times(tmp_path, ["1"], time_unit="s", time_format="%Y")


def test_times_of_floats_that_were_written_with_a_fraction(tmp_path):
    """1565457600.1 is no double: the shortest text that names the double is meant."""
    text = (
        '{"user": 1, "item": 1, "time": 1565457600.1}\n{"user": 1, "item": 2, "time": 1565457600}'
    )
    raw = readers.read_table(write(tmp_path / "t.jsonl", text))
    assert raw.interactions["timestamp"].to_list() == [1565457600100, 1565457600000]
    assert raw.time == "milliseconds since 1970" and raw.inferred["time_unit"] == "s"
