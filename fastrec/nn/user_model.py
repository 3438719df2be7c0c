"""The user model: item embedding, encoder and item head. Legend: T events, V items, D width."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrec.data.batch import JaggedBatch
from fastrec.nn.heads import ItemHead
from fastrec.nn.transformer import TransformerEncoder
from fastrec.random import Rng

# Special tokens are rows V, V + 1, ... of the embedding table, after the items.
SPECIAL_TOKENS = ("mask", "cls", "sep", "ur")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a user model.

    Attributes:
        width: D, the width of states and item vectors.
        layers, heads: of the transformer.
        ffn_width: inner width of the feed-forward network; 4 D if None.
        max_len: the most recent items of a user that are read, special tokens not counted.
        dropout: probability at every dropout site.
        causal: left-to-right instead of bidirectional attention.
        pre_norm: LayerNorm before the sublayers instead of after.
        norm_eps: added to the variance in the LayerNorms of the encoder.
        head_transform: dense-GELU-LayerNorm between state and item scores (BERT).
        use_cls, use_sep: put [CLS] before and [SEP] after the items.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    ffn_width: int | None = None
    max_len: int = 30
    dropout: float = 0.5
    causal: bool = False
    pre_norm: bool = False
    norm_eps: float = 1e-5
    head_transform: bool = True
    use_cls: bool = True
    use_sep: bool = True

    def __post_init__(self):
        for name in ("width", "layers", "heads", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), got {self.dropout}")


class UserModel(nn.Module):
    """Item embedding + encoder + item head.

    `encode` maps a batch to states [T, D]; `item_head.query` and `item_table` turn states into item
    scores. Dropout is on exactly where an `rng` is given, whatever train()/eval() say.
    """

    def __init__(self, num_items: int, config: ModelConfig):
        super().__init__()
        if config.causal and config.use_cls:
            raise ValueError("[CLS] stands first and sees nothing under causal attention")
        self.num_items, self.config = num_items, config
        self.item_embedding = nn.Embedding(num_items + len(SPECIAL_TOKENS), config.width)
        self.encoder = TransformerEncoder(
            config.width,
            config.max_len + config.use_cls + config.use_sep,
            layers=config.layers,
            heads=config.heads,
            ffn_width=config.ffn_width,
            dropout=config.dropout,
            causal=config.causal,
            pre_norm=config.pre_norm,
            norm_eps=config.norm_eps,
        )
        self.item_head = ItemHead(config.width, num_items, transform=config.head_transform)
        self.apply(_init_bert)

    def token(self, name: str) -> int:
        """Row of a special token in the embedding table: "mask", "cls", "sep" or "ur"."""
        return self.num_items + SPECIAL_TOKENS.index(name)

    @property
    def sequence_tokens(self) -> dict[str, int | None]:
        """What `SequenceDataset.gather` puts around the items of this model's input."""
        return {
            "cls_id": self.token("cls") if self.config.use_cls else None,
            "sep_id": self.token("sep") if self.config.use_sep else None,
        }

    @property
    def item_table(self) -> Tensor:
        """[V, D], the rows of the embedding that are items."""
        return self.item_embedding.weight[: self.num_items]

    def encode(self, batch: JaggedBatch, rng: Rng | None = None) -> Tensor:
        """States [T, D] of a batch. `rng` turns dropout on and is its key."""
        return self.encoder(self.item_embedding.weight, batch, rng, batch.values)

    forward = encode  # what a wrapper like DistributedDataParallel calls

    def save_pretrained(self, path: Path | str) -> None:
        """Write `model.safetensors` and `config.json` into the folder `path`."""
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        config = {"format": 1, "num_items": self.num_items, **asdict(self.config)}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()},
            path / "model.safetensors",
        )

    @classmethod
    def from_pretrained(cls, path: Path | str) -> "UserModel":
        """Read what `save_pretrained` wrote. Nothing is unpickled.

        Raises FileNotFoundError or ValueError that names the file and what is wrong with it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        for name in ("config.json", "model.safetensors"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path / name} is missing: {path} holds no fastrec model")
        try:
            config = json.loads((path / "config.json").read_text())
            if config.pop("format", None) != 1:
                raise ValueError("unknown format version, expected 1")
            model = cls(config.pop("num_items"), ModelConfig(**config))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path / 'config.json'}: {error}") from error
        try:
            model.load_state_dict(load_file(path / "model.safetensors"))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path / 'model.safetensors'}: {error}") from error
        return model


def _init_bert(module: nn.Module) -> None:
    # N(0, 0.02) for weights, zero biases, LayerNorm at identity (Devlin et al., 2019).
    if isinstance(module, nn.Linear | nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        torch.nn.init.zeros_(module.bias)
