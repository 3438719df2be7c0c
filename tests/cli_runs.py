# SPDX-License-Identifier: Apache-2.0
"""A file that the command line has prepared, pre-trained and fine-tuned, for tests of commands."""

import numpy as np
import pytest

FLAGS = [
    "--model.width=16", "--model.encoder.transformer.layers=1", "--pretraining.steps=20",
    "--pretraining.validate_every=10", "--recommendation.steps=10",
    "--recommendation.validate_every=5", "--evaluation.negatives=20",
]  # fmt: skip


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """200 users with string ids who walk around a ring of 60 items, as csv."""
    path = tmp_path_factory.mktemp("raw") / "log.csv"
    generator = np.random.default_rng(0)
    lines = ["who,what,when"]
    for user in range(200):
        place = int(generator.integers(60))
        for event in range(int(generator.integers(5, 12))):
            lines.append(f"u{user},item-{place},{1000 * user + event}")
            place = (place + int(generator.integers(1, 3))) % 60
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def runs(raw, tmp_path_factory):
    from fastrec.cli import main  # other tests do without its imports

    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data"
    main(
        ["prepare", f"--source={raw}", f"--output={data}", "--format=table", "--user_column=who",
         "--item_column=what", "--timestamp_column=when"]
    )  # fmt: skip
    config = ["--config", "uprec-mip", *FLAGS, f"--data={data}"]
    main(["pretrain", *config, f"--output={folder / 'pretrain'}"])
    main(
        ["finetune", *config, f"--init={folder / 'pretrain' / 'model'}",
         f"--output={folder / 'finetune'}"]
    )  # fmt: skip
    return folder
