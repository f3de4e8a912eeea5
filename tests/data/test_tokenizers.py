"""Text becomes tokens and comes back, whole, in pieces and token by token."""

import random
import sys

import numpy as np
import pytest

from dbkernels.data.bpe import END_OF_TEXT, train_bpe
from dbkernels.data.token_files import write_tokens
from dbkernels.data.tokenizer import (
    Bytes,
    Text8,
    encoded,
    hash_of,
    open_tokenizer,
    save_tokenizer,
    tokenizer_of,
)

WORDS = ["the", "theme", "of", "those", "thirty-three", "日本語", "naïve", "🙂🙂", "\t", "1999"]
WORDS += ["\r\n\n", "Ω"]
NAMES = ["bytes", "text8", "bpe"]


def texts(seed, count=40):
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(draw.choice([*WORDS, " ", "\n"]) for _ in range(draw.randrange(20)))


@pytest.fixture(scope="module")
def tokenizers():
    return {"bytes": Bytes(), "text8": Text8(), "bpe": train_bpe(texts(1), 300, "bpe")}


def joined(some):
    return np.concatenate([ids for ids, _ in some])


def normal(text):
    """Such as Mahoney's script makes text8, letter by letter."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    digits = dict(zip("0123456789", names, strict=True))
    spelled = "".join(f" {digits[letter]} " if letter in digits else letter for letter in text)
    small = (chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in spelled)
    return " ".join("".join(c if "a" <= c <= "z" else " " for c in small).split())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_encoded_is_decoded_again_in_whatever_pieces(tokenizers, name):
    tokenizer, draw = tokenizers[name], random.Random(2)
    for text in texts(3):
        ids = encoded(tokenizer, text)
        expected = normal(text) if name == "text8" else text
        assert tokenizer.decode(ids) == expected
        assert sum(count for _, count in tokenizer.encode([text])) == len(expected)
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocabulary)
        # token by token, and some at a time
        decoder, told, place = tokenizer.decoder(), [], 0
        while place < len(ids):
            some = draw.randrange(4)
            told.append(decoder.more(ids[place : place + some]))
            place += some
        assert "".join(told) + decoder.rest() == expected
        if name != "bpe":  # whose words depend on where a text is cut
            cuts = sorted(draw.randrange(len(text) + 1) for _ in range(3))
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            assert joined(tokenizer.encode(pieces)).tolist() == ids.tolist()


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_character_is_told_when_its_last_byte_is_there(tokenizers, name):
    tokenizer = tokenizers[name]
    ids = encoded(tokenizer, "aж")
    decoder = tokenizer.decoder()
    told = [decoder.more([number]) for number in ids]
    assert "".join(told) == "aж" and told[-1] == "ж" and "" in told
    cut = tokenizer.decoder()
    assert "".join(cut.more([number]) for number in ids[:-1]) == "a"
    assert cut.rest() == "\ufffd" == tokenizer.decode(ids[:-1])[1:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Anarchism ORIGINATED", "anarchism originated"),
        ("in 1905, he", "in one nine zero five he"),
        ("a1b", "a one b"),
        ("  -- it's naïve--", "it s na ve"),
        ("\u212a", ""),  # a sign for kelvin, of which Unicode's small letter is k
        ("日本 1", "one"),
        ("", ""),
    ],
)
def test_text8_has_small_letters_and_single_spaces_and_spells_digits(text, expected):
    ids = encoded(Text8(), text)
    assert Text8().decode(ids) == expected == normal(text)
    assert ids.tolist() == [" abcdefghijklmnopqrstuvwxyz".index(letter) for letter in expected]


def test_a_text_of_text8_that_goes_on_ends_with_a_space_where_it_has_a_word():
    assert Text8().decode(joined(Text8().encode(["one ", "!", ""], goes_on=True))) == "one "
    assert not joined(Text8().encode(["!", "?"], goes_on=True)).size


def test_a_trained_bpe_has_words_and_an_end_that_no_text_can_say(tokenizers):
    bpe = tokenizers["bpe"]
    assert bpe.vocabulary == 300 and bpe.separator == ()
    assert len(encoded(bpe, "the the the")) < 11
    assert bpe.decode([bpe.end_of_text]) == ""
    ids = encoded(bpe, f"a{END_OF_TEXT}b")
    assert bpe.end_of_text not in ids and bpe.decode(ids) == f"a{END_OF_TEXT}b"
    assert hash_of(bpe) == hash_of(train_bpe(texts(1), 300, "other"))
    assert hash_of(bpe) != hash_of(train_bpe(texts(1), 299, "bpe"))


def test_a_bpe_of_little_text_has_fewer_words(tokenizers):
    small = train_bpe(["ab"], 300, "bpe")
    assert small.vocabulary == 258 and small.decode(encoded(small, "ab日")) == "ab日"


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_gives_its_tokenizer_back(tokenizers, tmp_path, name):
    tokenizer = tokenizers[name]
    save_tokenizer(tokenizer, tmp_path)
    again = tokenizer_of(tmp_path)
    assert hash_of(again) == hash_of(tokenizer) and again.vocabulary == tokenizer.vocabulary
    assert (again.end_of_text, again.separator) == (tokenizer.end_of_text, tokenizer.separator)
    assert encoded(again, "the theme 1").tolist() == encoded(tokenizer, "the theme 1").tolist()
    # beside tokens, it must be theirs
    write_tokens(tmp_path, {"train": [[1]]}, vocabulary=tokenizer.vocabulary, hash=hash_of(again))
    assert hash_of(tokenizer_of(tmp_path)) == hash_of(tokenizer)
    save_tokenizer(tokenizers[NAMES[NAMES.index(name) - 1]], tmp_path)
    with pytest.raises(ValueError, match=r"must be the tokenizer that made the tokens beside it"):
        tokenizer_of(tmp_path)


def test_ends_of_other_tokenizers_are_found_and_others_have_a_separator(tokenizers, tmp_path):
    path = tmp_path / "my.json"
    for end, found in (("</s>", 0), ("<eos>", 0), ("<mine>", None)):
        path.write_text(tokenizers["bpe"].text.replace(END_OF_TEXT, end))
        tokenizer = open_tokenizer(path)
        assert tokenizer.name == "my.json" and tokenizer.end_of_text == found
        assert tokenizer.decode(tokenizer.separator) == ("\n" if found is None else "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer must be bytes, text8 or the path of a JSON file, got .*my.json"),
        (b"", "my.json is no tokenizer: "),
        (b"{}", "my.json is no tokenizer: "),
        (b"\xff", "my.json is no tokenizer: "),
        (b'{"type": "text9"}\n', "my.json is no tokenizer: "),
    ],
)
def test_rejects(tmp_path, content, message):
    if content is not None:
        (tmp_path / "my.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        open_tokenizer(tmp_path / "my.json")
    assert "\n" not in str(raised.value)


def test_a_directory_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer: expected tokenizer.json in it"):
        tokenizer_of(tmp_path)


def test_without_the_library_a_file_says_what_to_install(monkeypatch, tokenizers, tmp_path):
    save_tokenizer(tokenizers["bpe"], tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: tokenizer_of(tmp_path), lambda: train_bpe(["a"], 300, "bpe")):
        with pytest.raises(ValueError, match=r"pip install dbkernels\[tokenizers\]"):
            call()
    assert open_tokenizer("bytes").vocabulary == 256
