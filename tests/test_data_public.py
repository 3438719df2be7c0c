# SPDX-License-Identifier: Apache-2.0
"""Files in the shape of public data sets, read with the flags of the table in docs/data.md."""

import gzip
import json
import re
import shlex
from pathlib import Path

import polars as pl
import pytest

from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset

DOCS = Path(__file__).parent.parent / "docs" / "data.md"
AMAZON = {"rating": 5.0, "title": "x", "asin": "B00YQ6", "parent_asin": "B00YQ6", "user_id": "AGKH"}
OLD = {"overall": 5.0, "verified": True, "reviewTime": "09 4, 2015", "reviewerID": "A3CI",
       "asin": "B0002", "style": {"Size:": " 1"}, "unixReviewTime": 1441324800}  # fmt: skip
YELP = {"review_id": "KU", "user_id": "mh_", "business_id": "XQ", "stars": 3.0, "text": "a\n,b",
        "date": "2018-07-07 22:09:11"}  # fmt: skip
STEAM = (
    "{u'username': u'Chaos', u'hours': 0.1, u'product_id': u'725280', u'date': u'2017-12-17',"
    " u'text': u\"isn't\", u'early_access': False}\n"
)
# By file: content, then (user, item, timestamp) of its first event in order of user, and how many.
FILES: dict[str, tuple[str, tuple, int]] = {
    "ratings.csv": (
        "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,3.5,1112484676\n",
        (1, 29, 1112484676), 2),
    "ratings.dat": ("1::122::5::838985046\n1::185::4.5::838983525\n", (1, 185, 838983525), 2),
    "ratings_Beauty.csv": ("A39H,0205616461,5.0,1369699200\n", ("A39H", "0205616461", 1369699200),
                           1),
    "All_Beauty.csv": ("0143026860,A1V6,1.0,1424304000\n", ("A1V6", "0143026860", 1424304000), 1),
    "All_Beauty.json.gz": (json.dumps(OLD) + "\n", ("A3CI", "B0002", 1441324800), 1),
    "All_Beauty.jsonl.gz": (json.dumps(AMAZON | {"timestamp": 1588687728923}) + "\n",
                            ("AGKH", "B00YQ6", 1588687728923), 1),
    "yelp_academic_dataset_review.json": (json.dumps(YELP) + "\n",
                                          ("mh_", "XQ", 1531001351000000), 1),
    "userid-timestamp-artid-artname-traid-traname.tsv": (
        'user_000001\t2009-05-04T23:08:57Z\tf1\tDeep Dish\t\tFuck "Me"\n'
        "user_000001\t2009-05-04T13:54:10Z\ta7\t坂本龍一\tt1\tX\n",
        ("user_000001", "t1", 1241445250000000), 1),
    "loc-gowalla_totalCheckins.txt": (
        "0\t2010-10-19T23:55:27Z\t30.23\t-97.79\t22847\n"
        "0\t2010-10-18T22:17:43Z\t30.26\t-97.74\t420315\n", (0, 420315, 1287440263000000), 2),
    "dataset_TSMC2014_NYC.txt": (
        "470\t49bb\t4bf5\tCafé\t40.7\t-74.0\t-240\tTue Apr 03 18:00:09 +0000 2012\n",
        (470, "49bb", 1333476009000000), 1),
    "events.csv": (
        "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n"
        "1433221999827,111016,addtocart,318965,\n1433221955914,483717,transaction,253185,12\n",
        (111016, 318965, 1433221999827), 2),
    "UserBehavior.csv": ("1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n",
                         (1, 2333346, 1511561733), 1),
    "yoochoose-clicks.dat": ("1,2014-04-07T10:51:09.277Z,214536502,0\n",
                             (1, 214536502, 1396867869277000), 1),
    "train-item-views.csv": (
        "sessionId;userId;itemId;timeframe;eventdate\n1;NA;81766;526309;2016-05-09\n",
        (1, 81766, 526309), 1),
    "2019-Oct.csv": (
        "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,"
        "user_session\n2019-10-01 00:00:00 UTC,view,44600062,21,,shiseido,35.79,541312140,72d7\n"
        "2019-10-01 00:02:14 UTC,purchase,1004856,20,x,samsung,130.76,543272936,8187\n",
        (543272936, 1004856, 1569888134000000), 1),
    "online_retail_II.csv": (
        "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country\n"
        '489434,85048,"LIGHTS, ""15CM""",12,2009-12-01 07:45:00,6.95,13085.0,UK\n'
        "489434,85048,LIGHTS,12,2009-12-01 07:45:00,6.95,13085.0,UK\n"
        "489435,22350,CAT BOWL,12,2009-12-01 07:46:00,2.55,,UK\n",
        ("13085.0", 85048, 1259653500000000), 1),
    "transactions_train.csv": (
        "t_dat,customer_id,article_id,price,sales_channel_id\n2018-09-20,0000,0663713001,0.05,2\n",
        ("0000", "0663713001", 1537401600000000), 1),
    "steam_reviews.json.gz": (STEAM, ("Chaos", 725280, 1513468800000000), 1),
    "steam-200k.csv": (
        '151603712,"Skyrim, V",purchase,1.0,0\n151603712,"Skyrim, V",play,273.0,0\n',
        (151603712, "Skyrim, V", 0), 1),
    "BX-Book-Ratings.csv": ('"User-ID";"ISBN";"Book-Rating"\n"276725";"034545104X";"0"\n',
                            (276725, "034545104X", 0), 1),
    "behaviors.tsv": (
        "1\tU13\t11/11/2019 9:05:58 AM\tN5 N4\tN9-1 N8-0\n2\tU73\t11/14/2019 7:01:48 AM\t\tN9-0\n"
        "3\tU13\t11/14/2019 7:01:48 AM\tN5 N4\tN7-0\n", ("U13", "N5", 0), 2),
}  # fmt: skip


def documented() -> dict[str, list[str]]:
    """The flags of each file of the table."""
    table = DOCS.read_text().split("| data set, file | flags |\n|---|---|\n")[1].split("\n\n")[0]
    flags = {}
    for line in table.splitlines():
        _, what, how, _ = line.split("|")
        said = re.search("`(--.*?)`", how)
        flags[re.findall("`(.*?)`", what)[-1]] = shlex.split(said[1]) if said else []
    return flags


def test_the_table_lists_these_files():
    assert documented().keys() == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_public_data_set_is_read_with_the_flags_of_the_table(tmp_path, capsys, name):
    text, first, count = FILES[name]
    flags = documented()[name]
    data = text.encode("latin-1" if "latin-1" in flags else "utf-8")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    main(["prepare", "--source", str(tmp_path / name), "--output", str(tmp_path / "data"), *flags])
    dataset = SequenceDataset.load(tmp_path / "data")
    event = pl.read_parquet(tmp_path / "data" / "interactions.parquet").row(0)
    assert (dataset.user_ids()[event[0]], dataset.item_ids()[event[1]], event[2]) == first
    assert dataset.num_events == count
    assert f"begins with: user {first[0]!r}" in capsys.readouterr().out
