# SPDX-License-Identifier: Apache-2.0
"""The embedded default data: synthetic users with latent communities and order. No download.

Items have a Zipf popularity and belong to communities; those of a community stand in a circle, the
chain. The successors of an item are a few of the next ones on the chain, chosen by popularity, so
that neighbours share most of them. A user has a main and a second community. A sequence is made of
sessions: a session picks a community and a popular item in it, then mostly walks to successors,
sometimes jumps inside the community, rarely anywhere. Attributes, ratings and friendships depend on
the main community, so that profile and social tasks carry signal about behaviour.

Sequences are short, as in the Yelp data of UPRec: from 5, median 7, mean about 10, a long tail.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fastrec.data.dataset import SequenceDataset
from fastrec.data.event_columns import SECONDS
from fastrec.data.output import scratch_folder
from fastrec.data.prepare.store import Store
from fastrec.data.prepare.writer import Interactions, check_output, claim, write_dataset

REGIONS = ("north", "east", "south", "west", "centre", "islands")
_SUCCESSORS = np.array([0.3, 0.22, 0.16, 0.13, 0.1, 0.09])  # probability of each successor
_REACH = 12  # successors are among the next 12 items of the chain
_MIN_LENGTH = 5
BLOCK = 1 << 16  # users in memory at a time
_EVENTS = {"user": np.int64, "item": np.int64, "timestamp": np.int64, "rating": np.float32}


def generate(
    output,
    *,
    num_users: int = 20_000,
    num_items: int = 5_000,
    seed: int = 0,
    num_communities: int | None = None,
    walk: float = 0.5,
    new_session: float = 0.2,
    zipf: float = 0.7,
    mean_friends: float = 8.0,
    median_length: float = 7.7,
    max_length: int = 350,
    overwrite: bool = False,
) -> SequenceDataset:
    """Write a synthetic canonical dataset to the directory `output` and open it.

    num_communities: default one per 100 items. walk: probability that an event inside a session
    goes to a successor of the last item (0: order carries no signal). new_session: probability that
    an event opens a session. zipf: exponent of the popularity. mean_friends: links per user who has
    any; about one user in seven has none. median_length, max_length: of the sequences.

    Tables beyond the minimum: interactions.rating (1..5, whole), users.mean_rating (numeric, 1..5),
    users.region (categorical, 6 values), items.category (int), items.price (numeric),
    items.attributes (list of int: tags), relations (each link once, user < friend), cold_items (1
    to 5 items of another catalogue of num_items // 5 for five users in six, mostly those of the
    main community).
    The output is a function of the arguments. Users are drawn `BLOCK` at a time, and their events
    go to disk: memory grows with users and items, not with events.
    """
    least = {"num_users": (num_users, 2), "num_items": (num_items, 10), "zipf": (zipf, 0),
             "mean_friends": (mean_friends, 0), "seed": (seed, 0)}  # fmt: skip
    if num_communities is not None:
        least["num_communities"] = (num_communities, 1)
    for name, (value, bound) in least.items():
        if not value >= bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")
    if not (0 <= walk <= 1 and 0 <= new_session <= 1):
        raise ValueError(f"walk and new_session are probabilities, got {walk} and {new_session}")
    if max_length < _MIN_LENGTH:
        raise ValueError(f"max_length must be at least {_MIN_LENGTH}, got {max_length}")
    if not median_length > _MIN_LENGTH:
        raise ValueError(f"median_length must be above {_MIN_LENGTH}, got {median_length}")
    output = Path(output)
    check_output(output, overwrite)
    rng = np.random.default_rng(seed)
    communities = num_communities or max(2, num_items // 100)
    catalogue = _Catalogue(rng, num_items, min(communities, num_items // 2), zipf)
    world = _World(catalogue, median_length, max_length, walk, new_session)
    people = []
    with claim(output, overwrite), scratch_folder(output) as folder:
        events = Store(folder / "events", _EVENTS)
        for start in range(0, num_users, BLOCK):
            own = rng if start == 0 else np.random.default_rng([seed, start // BLOCK])
            block, columns = world.users(own, min(BLOCK, num_users - start))
            people.append(block)
            events.append(columns | {"user": columns["user"] + start})
        main, mean_rating, region = (np.concatenate(parts) for parts in zip(*people, strict=True))
        users = pl.DataFrame(
            {
                "user_id": np.arange(num_users),
                "mean_rating": mean_rating.astype(np.float32),
                "region": pl.Series(REGIONS).gather(region),
            }
        )
        schema = {name: pl.Float32 if name == "rating" else pl.Int64 for name in _EVENTS}
        write_dataset(
            output,
            interactions=Interactions(
                schema, events.height, lambda: (pl.DataFrame(each) for each in events.chunks())
            ),
            users=users,
            items=catalogue.table(rng),
            relations=pl.DataFrame(_links(rng, main, mean_friends), schema=["user", "friend"]),
            cold_items=_cold_items(rng, main, num_items // 5),
            tie_rule="no ties",
            time=SECONDS,
            source=f"fastrec.data.prepare.synthetic, seed {seed}",
            overwrite=overwrite,
        )
    return SequenceDataset.load(output)


class _World:
    """What all users share; `users` draws some of them."""

    def __init__(
        self, catalogue: "_Catalogue", median_length: float, max_length: int, walk, new_session
    ):
        self.catalogue, self.walk, self.new_session = catalogue, walk, new_session
        self.extra, self.max_length = median_length - _MIN_LENGTH, max_length
        sizes = 1 / np.arange(3, catalogue.communities + 3) ** 0.5
        self.share = np.cumsum(sizes / sizes.sum())
        self.share[-1] = 1.0
        self.taste: Any = None  # of a community; and the quality of an item, a community's region
        self.quality: Any = None
        self.home: Any = None

    def users(self, rng, count: int):
        """((main community, mean rating, region) of `count` users, their events by column)."""
        catalogue, share = self.catalogue, self.share
        main = np.searchsorted(share, rng.random(count), side="right")
        second = np.searchsorted(share, rng.random(count), side="right")
        extra = np.exp(np.log(self.extra) + 1.25 * _normal(rng, count))
        lengths = np.minimum(_MIN_LENGTH + extra.astype(np.int64), self.max_length)
        item, opens = _walk(
            rng, catalogue, main, second, share, lengths, self.walk, self.new_session
        )
        user = np.repeat(np.arange(count), lengths)
        gaps = -np.log1p(-rng.random(len(user))) * np.where(opens, 6 * 86_400.0, 600.0)
        clock = np.cumsum(gaps.astype(np.int64) + 1)
        first = np.cumsum(lengths) - lengths
        begin = 1_500_000_000 + (rng.random(count) * 365 * 86_400).astype(np.int64)
        timestamp = clock + np.repeat(begin - clock[first], lengths)

        begun = self.taste is not None  # what all share is drawn among what the first users draw
        if not begun:
            self.taste = 3.6 + 0.6 * _normal(rng, catalogue.communities)
        mean_rating = np.clip(self.taste[main] + 0.3 * _normal(rng, count), 1, 5)
        if not begun:
            self.quality = 0.5 * _normal(rng, len(catalogue.item))
        noise = 0.6 * _normal(rng, len(user))
        rating = np.clip(np.rint(mean_rating[user] + self.quality[item] + noise), 1, 5)
        if not begun:
            self.home = _regions(rng, catalogue.communities)
        at_home = rng.random(count) < 0.7
        region = np.where(at_home, self.home[main], _regions(rng, count))
        columns = {"user": user, "item": item, "timestamp": timestamp, "rating": rating}
        return (main, mean_rating, region), columns


def _regions(rng, count: int) -> np.ndarray:
    return (rng.random(count) * len(REGIONS)).astype(np.int64)


class _Catalogue:
    """Items with a community, a popularity and successors. Slots are items sorted by community."""

    def __init__(self, rng, num_items: int, communities: int, zipf: float):
        self.communities = communities
        rank = np.argsort(rng.random(num_items))  # popularity rank of each slot
        weight = 1 / (rank + 10.0) ** zipf
        self.bounds = np.arange(communities + 1) * num_items // communities
        self.community = np.repeat(np.arange(communities), np.diff(self.bounds))
        self.cumulative = np.concatenate(([0.0], np.cumsum(weight)))
        self.item = np.argsort(rng.random(num_items))  # item id of each slot
        start, size = self.bounds[self.community], np.diff(self.bounds)[self.community]
        place = np.arange(num_items) - start
        reach = 1 + np.arange(_REACH) % (size[:, None] - 1)  # never back to the item itself
        ahead = start[:, None] + (place[:, None] + reach) % size[:, None]  # [V, 12]
        gumbel = -np.log(-np.log1p(-rng.random(ahead.shape)) + 1e-300)
        best = np.argsort(-(np.log(weight)[ahead] + gumbel), axis=1, kind="stable")
        self.successors = np.take_along_axis(ahead, best[:, : len(_SUCCESSORS)], axis=1)

    def draw(self, rng, community=None, count: int | None = None) -> np.ndarray:
        """A slot per entry of `community`, or `count` slots of the whole, by popularity."""
        if community is None:
            low, high = 0.0, self.cumulative[-1]
            shot = low + rng.random(count) * (high - low)
            return np.minimum(self._find(shot), len(self.item) - 1)
        low = self.cumulative[self.bounds[community]]
        high = self.cumulative[self.bounds[community + 1]]
        found = self._find(low + rng.random(len(community)) * (high - low))
        return np.clip(found, self.bounds[community], self.bounds[community + 1] - 1)

    def _find(self, shot: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.cumulative, shot, side="right") - 1

    def table(self, rng) -> pl.DataFrame:
        num_items = len(self.item)
        category = np.empty(num_items, dtype=np.int64)
        category[self.item] = self.community % 12
        price = np.exp(2.5 + 0.5 * _normal(rng, 12)[category] + 0.4 * _normal(rng, num_items))
        tags = 12 + (rng.random((num_items, 2)) * 40).astype(np.int64)
        topic = np.empty(num_items, dtype=np.int64)
        topic[self.item] = 52 + self.community % 60
        attributes = np.sort(np.column_stack((category, tags, topic)), axis=1)
        return pl.DataFrame(
            {
                "item_id": np.arange(num_items),
                "category": category,
                "price": price.astype(np.float32).round(2),
                "attributes": pl.Series(attributes.tolist(), dtype=pl.List(pl.Int64)),
            }
        ).with_columns(pl.col("attributes").list.unique(maintain_order=True))


def _walk(rng, catalogue: _Catalogue, main, second, share, lengths, walk, new_session):
    """(item int64 [E], bool [E]: the event opens a session), user by user in time order."""
    by_length = np.argsort(-lengths, kind="stable")
    ranked = lengths[by_length]
    main, second = main[by_length], second[by_length]
    first = (np.cumsum(lengths) - lengths)[by_length]
    item = np.empty(lengths.sum(), dtype=np.int64)
    opens = np.zeros(len(item), dtype=bool)
    limits = np.cumsum(_SUCCESSORS)
    slot = np.zeros(len(lengths), dtype=np.int64)
    # All users take step t together; the longest come first, so the active ones are a prefix.
    for t in range(int(ranked[0])):
        active = int(np.searchsorted(-ranked, -t, side="left"))
        begins = (rng.random(active) < new_session) | (t == 0)
        taste = rng.random(active)
        community = np.where(taste < 0.65, main[:active], second[:active])
        other = np.searchsorted(share, rng.random(active), side="right")
        community = np.where(taste > 0.9, other, community)
        community = np.where(begins, community, catalogue.community[slot[:active]])
        branch = np.searchsorted(limits, rng.random(active), side="right")
        branch = np.minimum(branch, len(_SUCCESSORS) - 1)
        kind = rng.random(active)
        jump = catalogue.draw(rng, community)
        anywhere = catalogue.draw(rng, count=active)
        step = np.where(kind < walk, catalogue.successors[slot[:active], branch], jump)
        step = np.where((kind >= walk) & (kind > 1 - 0.2 * (1 - walk)), anywhere, step)
        slot[:active] = np.where(begins, jump, step)
        item[first[:active] + t] = catalogue.item[slot[:active]]
        opens[first[:active] + t] = begins
    return item, opens


def _links(rng, main: np.ndarray, mean_friends: float) -> np.ndarray:
    """int64 [R, 2]: distinct pairs user < friend; four in five stay inside the main community."""
    num_users = len(main)
    order = np.argsort(main, kind="stable")
    start = np.searchsorted(main[order], np.arange(main.max() + 2))
    # Half of the links of a user are drawn by the user, the other half by the friends.
    wanted = np.exp(0.8 * _normal(rng, num_users) - 0.32) * mean_friends / 2
    social = rng.random(num_users) >= 1 / 7
    user = np.repeat(np.arange(num_users), np.where(social, np.rint(wanted), 0).astype(np.int64))
    low, high = start[main[user]], start[main[user] + 1]
    near = order[low + (rng.random(len(user)) * (high - low)).astype(np.int64)]
    far = (rng.random(len(user)) * num_users).astype(np.int64)
    friend = np.where(rng.random(len(user)) < 0.8, near, far)
    kept = (user != friend) & social[friend]
    pairs = np.column_stack((user[kept], friend[kept]))
    return np.unique(np.sort(pairs, axis=1), axis=0).astype(np.int64)


def _cold_items(rng, main: np.ndarray, number: int) -> pl.DataFrame:
    """user, item, item_id: what users took of a catalogue of `number` items, each of one community,
    the first ones of a community most often."""
    count = (rng.random(len(main)) * 6).astype(np.int64)  # 0 to 5
    user = np.repeat(np.arange(len(main)), count)
    communities = int(main.max()) + 1
    size = max(1, number // communities)
    near = main[user] * size + (size * rng.random(len(user)) ** 2).astype(np.int64)
    far = (number * rng.random(len(user))).astype(np.int64)
    item = np.where(rng.random(len(user)) < 0.8, near % number, far)
    pairs = np.unique(np.column_stack((user, item)), axis=0)
    used, number_of = np.unique(pairs[:, 1], return_inverse=True)
    ids = pl.Series([f"cold-{item}" for item in used.tolist()])
    columns = {"user": pairs[:, 0], "item": number_of.reshape(-1)}
    return pl.DataFrame(columns).with_columns(ids.gather(columns["item"]).alias("item_id"))


def _normal(rng, count: int) -> np.ndarray:
    radius = np.sqrt(-2 * np.log1p(-rng.random(count)))
    return radius * np.cos(2 * np.pi * rng.random(count))
