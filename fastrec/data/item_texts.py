# SPDX-License-Identifier: Apache-2.0
"""Items as texts: the columns of items.parquet as pairs of key and value, cut into tokens.

Legend: V items, W tokens of the vocabulary, N tokens of all items, B sequences, T events.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from fastrec.data.batch import JaggedBatch, offsets_of, spans
from fastrec.data.dataset import SequenceDataset, hash_of
from fastrec.data.errors import DataError

KEY, VALUE = 0, 1  # `segment` of a token; special tokens have -1
UNKNOWN = "[UNK]"


@dataclass(frozen=True)
class Texts:
    """The events of the model are the tokens of the texts of its items, not the items (Recformer,
    Li et al., 2023, section 3.1). The text of an item is its attributes, key and value each.

    Attributes:
        columns: of items.parquet, in this order; an empty list takes all.
        vocabulary: W at most: single characters, and the most frequent words. A word that is not
            among them is spelled.
        most: tokens of an item that are read, the first ones of a longer text.
    """

    columns: list[str] = field(default_factory=list)
    vocabulary: int = 10000
    most: int = 32

    def __post_init__(self):
        for name in ("vocabulary", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"texts.{name} must be at least 1, got {getattr(self, name)}")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"texts.columns names one twice: {self.columns}")


def item_texts(dataset, columns: Sequence[str] = ()) -> list[list[tuple[str, str]]]:
    """The text of each item: (key, value) of the columns in their order, without those that are
    null or empty. A list is its members with spaces between, an underscore of a key is a space.

    columns: of items.parquet; none takes all.

    Raises DataError for a column that is missing or no text, or no columns at all.
    """
    import polars as pl

    frame, file = dataset.item_attributes(), dataset.path / "items.parquet"
    there = [name for name in frame.columns if name not in ("item", "item_id")]
    if not there:
        raise DataError(file, "has no attributes: prepare the data set with --item_attributes")
    texts: list[list[tuple[str, str]]] = [[] for _ in range(frame.height)]
    for name in columns or there:
        if name not in there:
            raise DataError(file, f"column is missing; the attributes are {there}", column=name)
        column, key = frame[name], name.replace("_", " ")
        listed = isinstance(column.dtype, pl.List)
        kind = column.dtype.inner if listed else column.dtype  # type: ignore[attr-defined]
        if kind.is_nested() or kind in (pl.Binary, pl.Duration):
            raise DataError(file, f"{column.dtype} is no text", column=name)
        if listed:
            column = column.cast(pl.List(pl.String)).list.drop_nulls().list.join(" ")
        for text, value in zip(texts, column.cast(pl.String).to_list(), strict=True):
            if value:
                text.append((key, value))
    return texts


def make_tokenizer(texts: Sequence[Sequence[tuple[str, str]]], vocabulary: int) -> str:
    """A WordPiece tokenizer of lower-case words as the JSON of `tokenizers`, a function of the
    texts alone: what its trainers make differs from run to run.

    Raises ValueError where the single characters are more than `vocabulary`.
    """
    tokenizers = _tokenizers()
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({UNKNOWN: 0}, unk_token=UNKNOWN))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text, times in Counter(part for pairs in texts for pair in pairs for part in pair).items():
        normal = made.normalizer.normalize_str(text)
        for word, _ in made.pre_tokenizer.pre_tokenize_str(normal):
            counts[word] += times
    first = {word[0] for word in counts}
    inner = {f"##{letter}" for word in counts for letter in word[1:]}
    tokens = [UNKNOWN, *sorted(first), *sorted(inner)]
    if len(tokens) > vocabulary:
        raise ValueError(
            f"texts.vocabulary is {vocabulary}, and single characters make {len(tokens)} tokens"
        )
    words = sorted(counts.keys() - first, key=lambda word: (-counts[word], word))
    tokens += words[: vocabulary - len(tokens)]
    made.model = tokenizers.models.WordPiece(
        {token: number for number, token in enumerate(tokens)}, unk_token=UNKNOWN
    )
    return made.to_str()


class TextData:
    """A data set as sequences of the tokens of its items, the latest item first: values are tokens
    in [0, W), `segment` is `KEY` or `VALUE`, and `item_place` the number of the item from 0.

    values, segments: int64 [N], the texts of all items end to end. offsets: int64 [V + 1].
    An item of which nothing is known is one token, [UNK].

    Args:
        dataset: users, splits and items.
        settings: of the texts.
        tokenizer: JSON of `make_tokenizer`; None makes one of the texts.

    Raises DataError, ModuleNotFoundError without `tokenizers`, ValueError for a tokenizer that
    cannot be read.
    """

    def __init__(self, dataset: SequenceDataset, settings: Texts, tokenizer: str | None = None):
        self.dataset, self.settings, self.path = dataset, settings, dataset.path
        texts = item_texts(dataset, settings.columns)
        self.tokenizer = tokenizer or make_tokenizer(texts, settings.vocabulary)
        try:
            tool = _tokenizers().Tokenizer.from_str(self.tokenizer)
        except Exception as error:  # `tokenizers` raises no other kind
            raise ValueError(f"the tokenizer cannot be read: {error}") from error
        pieces = sorted({part for pairs in texts for pair in pairs for part in pair})
        found = tool.encode_batch(pieces, add_special_tokens=False)
        ids = {part: made.ids for part, made in zip(pieces, found, strict=True)}
        vocabulary = tool.get_vocab()
        values, segments, sizes = [], [], []
        for pairs in texts:
            text = [(t, kind) for pair in pairs for kind in (KEY, VALUE) for t in ids[pair[kind]]]
            text = text[: settings.most] or [(vocabulary[UNKNOWN], VALUE)]
            values += [token for token, _ in text]
            segments += [kind for _, kind in text]
            sizes.append(len(text))
        self.values, self.segments = (
            torch.tensor(part, dtype=torch.int64, device="cpu") for part in (values, segments)
        )
        self.offsets = offsets_of(torch.tensor(sizes, dtype=torch.int64, device="cpu"))
        self.names = np.array(sorted(vocabulary, key=vocabulary.__getitem__), dtype=object)

    @property
    def num_items(self) -> int:
        """W: the tokens are the items of the model."""
        return len(self.names)

    @property
    def num_users(self) -> int:
        return self.dataset.num_users

    @property
    def schema(self) -> dict:
        return self.dataset.schema

    @property
    def splits(self) -> np.ndarray | None:
        return self.dataset.splits

    @cached_property
    def items_hash(self) -> str:
        """Of the tokens: a model goes to other items whose texts have the same."""
        return hash_of(self.names)

    @cached_property
    def events_hash(self) -> str:
        """Of the events and the texts: what a run is resumed on."""
        texts = (str(part.tolist()) for part in (self.values, self.segments, self.offsets))
        return hash_of(np.array([self.dataset.events_hash, *texts], dtype=object))

    @property
    def users_hash(self) -> str:
        return self.dataset.users_hash

    def item_ids(self) -> np.ndarray:
        """[W]: the tokens as text."""
        return self.names

    def user_ids(self) -> np.ndarray:
        return self.dataset.user_ids()

    def users(self, split: str) -> np.ndarray:
        return self.dataset.users(split)

    def user_attributes(self):
        return self.dataset.user_attributes()

    def gather(
        self, users, split: str, max_len: int | None = None, columns: Sequence[str] = ()
    ) -> JaggedBatch:
        """The inputs of `users` in `split` as tokens, at most `max_len` of the latest items."""
        if columns:
            raise ValueError(f"tokens have no ratings or times: the column {columns[0]!r}")
        return self.expand(self.dataset.gather(users, split, max_len), max_len)

    def expand(self, batch: JaggedBatch, max_len: int | None = None) -> JaggedBatch:
        """The tokens of sequences of items, at most `max_len`: the end of the text of the oldest
        item that is read may be cut off. Columns of events are left out."""
        owner, place = batch.segment_ids(), batch.positions()  # of the latest item the place is 0
        item = batch.values[batch.offsets[1:][owner] - 1 - place]
        sizes = self.offsets.diff()[item]  # [T]
        before = offsets_of(sizes)
        if max_len is not None:
            inside = before[:-1] - before[batch.offsets[:-1]][owner]
            sizes = sizes.minimum((max_len - inside).clamp_min(0))
            before = offsets_of(sizes)
        index = spans(self.offsets[:-1][item], sizes, before)
        offsets = before[batch.offsets]
        made = {
            "segment": self.segments[index],
            "item_place": place.repeat_interleave(sizes, output_size=len(index)),
        }
        longest = int(offsets.diff().max()) if len(batch) else 0
        return replace(
            batch, values=self.values[index], offsets=offsets, max_seq_len=longest, events=made
        )


def _tokenizers():
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "texts of items need the package tokenizers: pip install 'fastrec[text]'"
        ) from error
    return tokenizers
