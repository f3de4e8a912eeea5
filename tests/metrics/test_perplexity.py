"""Texts under somebody else's language model, and how varied they are."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from metrics.libraries import WORDS, transformers

from dbkernels.metrics import generative_perplexity

TEXTS = ["the cat sat on a mat", "a cat ran", "the cat and the cat"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model that reads six tokens."""
    monkeypatch.setitem(sys.modules, "transformers", transformers(max_position_embeddings=6))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def perplexity_of(texts):
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).half()
    chances = table.double().log_softmax(-1)
    pairs = [pair for text in texts for pair in pairwise(text)]
    return math.exp(-sum(float(chances[a, b]) for a, b in pairs) / len(pairs))


def numbered(text):
    return [WORDS.index(word) for word in text.split()]


def test_every_token_but_the_first_of_a_text_counts_once(folder):
    found = generative_perplexity(TEXTS, folder)
    assert found.perplexity == pytest.approx(perplexity_of(map(numbered, TEXTS)))
    assert generative_perplexity(TEXTS, str(folder)) == found


@pytest.mark.parametrize(("length", "read"), [(None, 6), (6, 6), (4, 4), (2, 2)])
def test_a_text_is_read_as_far_as_the_model_can_or_is_told(folder, length, read):
    long = " ".join(WORDS)
    found = generative_perplexity([long, "a mat"], folder, length=length)
    assert found.perplexity == pytest.approx(perplexity_of([list(range(read)), [4, 5]]))
    assert found.entropy == pytest.approx((math.log(read) + math.log(2)) / 2)


def test_a_model_that_knows_no_end_reads_all_of_a_text(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", transformers())
    found = generative_perplexity([" ".join(WORDS)], folder)
    assert found.perplexity == pytest.approx(perplexity_of([list(range(8))]))


def test_a_loop_has_little_entropy_and_texts_that_are_alike_few_different_runs(folder):
    # of the six runs of four words, two of the loop's are one, and so are those of equal texts
    loop, free = "the cat the cat the cat", "the cat sat on a mat"
    looped = generative_perplexity([loop], folder)
    varied = generative_perplexity([free], folder)
    alike = generative_perplexity([free] * 4, folder)
    assert looped.entropy == pytest.approx(math.log(2)) and looped.distinct == pytest.approx(2 / 3)
    assert varied.entropy == pytest.approx(math.log(6)) and varied.distinct == 1
    assert alike.entropy == pytest.approx(math.log(6)) and alike.distinct == 3 / 12
    assert alike.perplexity == pytest.approx(varied.perplexity)
    uneven = generative_perplexity(["the the the cat"], folder)
    assert uneven.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    # texts of fewer words are one run each
    assert generative_perplexity(["a mat", "a mat", "a cat"], folder).distinct == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("the cat", {}, "texts must be a list of at least one text, got 'the cat'"),
        ([], {}, r"texts must be a list of at least one text, got \[\]"),
        (["a mat", "cat"], {}, "two tokens or more, got 'cat' at place 1"),
        (TEXTS, {"length": 1}, "length must be at least 2, got 1"),
        (TEXTS, {"length": 7}, "length must be at most 6, got 7"),
    ],
)
def test_refuses_what_has_no_perplexity(folder, texts, options, message):
    with pytest.raises(ValueError, match=message):
        generative_perplexity(texts, folder, **options)


def test_refuses_a_folder_without_a_model_and_a_tokenizer_of_another_one(
    folder, tmp_path, monkeypatch
):
    with pytest.raises(
        ValueError, match="model must be a folder of a causal language model, got g"
    ):
        generative_perplexity(TEXTS, "gpt2")
    (empty := tmp_path / "empty").mkdir()
    expected = r"and its tokenizer, got .*/empty: there is no config\.json in empty$"
    with pytest.raises(ValueError, match=expected):
        generative_perplexity(TEXTS, empty)
    monkeypatch.setitem(sys.modules, "transformers", transformers(vocab_size=5))
    with pytest.raises(
        ValueError, match="every token of its tokenizer, got 5 and a vocabulary of 5"
    ):
        generative_perplexity(TEXTS, folder)


def test_says_which_package_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    expected = r"transformers must be installed .*\(pip install dbkernels\[text\]\), got an envir"
    with pytest.raises(ValueError, match=expected):
        generative_perplexity(TEXTS, folder)
