# SPDX-License-Identifier: Apache-2.0
"""The code of docs/language.md runs as it stands, on tiny language models with random weights, and
gives what plain PyTorch gives. Legend: B texts, L tokens, V tokens of the vocabulary."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

PAGE = Path(__file__).parent.parent / "docs" / "language.md"


def run(mark: str, **names) -> dict:
    """Run the block of the page between two marks."""
    block = PAGE.read_text().split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]
    exec(compile(block.split("```python")[1].split("```")[0], mark, "exec"), names)
    return names


def grads(module) -> dict:
    return {name: part.grad for name, part in module.named_parameters() if part.grad is not None}


def same_gradients(module, loss) -> None:
    """The gradients that are there are those of `loss`."""
    ours = grads(module)
    module.zero_grad()
    loss.backward()
    theirs = grads(module)
    assert ours and ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def bert():
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: the language models of the page"
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return transformers, config


def texts(number: int, length: int) -> torch.Tensor:
    """int64 [number, length] tokens from 5 on, 0 behind the end of a text."""
    tokens = torch.randint(5, 60, (number, length))
    ends = torch.randint(2, length + 1, (number, 1))
    return tokens.masked_fill(torch.arange(length) >= ends, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_p5(tied):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: the language models of the page"
    )
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    prompt, words = texts(3, 9), torch.nn.Embedding(10, 16)
    word, real = torch.arange(9).expand(3, 9) // 2, prompt > 0
    answer = texts(3, 5).masked_fill(torch.arange(5) > 3, 0)
    answer = answer.masked_fill(answer == 0, -100)
    names = run("p5", model=model, words=words, prompt=prompt, word=word, real=real, answer=answer)
    tokens = model.get_input_embeddings()(prompt) + words(word)
    whole = model(inputs_embeds=tokens, attention_mask=real, labels=answer)
    torch.testing.assert_close(names["loss"], whole.loss)
    same_gradients(model, whole.loss)


def test_masked_tokens(bert):
    transformers, config = bert
    model = transformers.BertForMaskedLM(config).eval()
    tokens = texts(4, 8)
    real = tokens > 0
    chosen = real & (torch.arange(8) % 3 == 1)
    names = run("mlm", model=model, tokens=tokens, real=real, chosen=chosen, mask_token=4)
    labels = tokens.masked_fill(~chosen, -100)
    whole = model(tokens.masked_fill(chosen, 4), attention_mask=real, labels=labels)
    torch.testing.assert_close(names["loss"], whole.loss)
    same_gradients(model, whole.loss)


def test_titles_of_bodies(bert):
    transformers, config = bert
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    bodies, titles = texts(3, 10), texts(7, 5)
    negatives = torch.tensor([[1, 2, 5], [0, 6, 4], [3, 4, 5]])
    names = run("dp", model=model, bodies=bodies, titles=titles, negatives=negatives)
    of_bodies, of_titles = names["encode"](bodies), names["encode"](titles)
    expected = torch.tensor(0.0)
    for i in range(3):
        scores = of_titles[[i, *negatives[i].tolist()]] @ of_bodies[i]
        expected = expected - scores.log_softmax(0)[0] / 3
    torch.testing.assert_close(names["loss"], expected)
    same_gradients(model, expected)


def test_clicked_news(bert):
    transformers, config = bert
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    query, news = torch.nn.Linear(16, 1), texts(8, 6)
    history, seen = (
        torch.tensor([[0, 1, 2], [3, 0, 0]]),
        torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(),
    )
    clicked, skipped = torch.tensor([4, 5]), torch.tensor([[6, 7], [1, 7]])
    names = run(
        "plm_nr",
        model=model,
        news=news,
        history=history,
        seen=seen,
        clicked=clicked,
        skipped=skipped,
        query=query,
    )
    vectors = model(news, attention_mask=news > 0).last_hidden_state[:, 0]
    expected = torch.tensor(0.0)
    for i, read in enumerate(([0, 1, 2], [3])):
        share = query(vectors[read]).softmax(0)
        scores = vectors[[int(clicked[i]), *skipped[i].tolist()]] @ (share * vectors[read]).sum(0)
        expected = expected - scores.log_softmax(0)[0] / 2
    torch.testing.assert_close(names["loss"], expected)
    same_gradients(model, expected)


def test_candidates_of_a_prompt():
    torch.manual_seed(0)
    seen = (torch.rand(30, 50) < 0.2).float()
    seen[:, 0] = 1  # nobody is without an item
    users, titles = torch.tensor([3, 17]), [f"film {i}" for i in range(50)]
    names = run("nir", seen=seen, users=users, titles=titles)
    for row, user in enumerate(users.tolist()):
        cosine = F.cosine_similarity(seen[user], seen)
        cosine[user] = -1
        near = cosine.argsort(descending=True, stable=True)[:12]
        counts = seen[near].sum(0).masked_fill(seen[user] > 0, -1)
        expected = counts.argsort(descending=True, stable=True)[:19].tolist()
        assert names["candidates"][row].tolist() == expected
        assert f"{titles[expected[0]]}, {titles[expected[1]]}" in names["prompts"][row]
        assert "I have watched: film 0, " in names["prompts"][row]
