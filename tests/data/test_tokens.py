"""Windows of tokens, the directory that has them, and what is refused of it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dbkernels.data import digest as digest_module
from dbkernels.data import tokens as tokens_module
from dbkernels.data.digest import digest
from dbkernels.data.formats import MissingSplit
from dbkernels.data.token_files import write_tokens
from dbkernels.data.tokens import Windows, open_tokens


def saved(directory, train=((1, 2, 3, 4, 5), (6, 7, 8)), test=((9, 10, 11),), vocabulary=27):
    splits = {"train": train} | ({"test": test} if test is not None else {})
    write_tokens(directory, splits, vocabulary=vocabulary)
    return directory


def everything(data):
    return data.batch(torch.arange(len(data)))["token"].tolist()


def naive(documents, length, stride):
    found = []
    for document in documents:
        start = 0
        while start + length < len(document):
            found.append(document[start : start + length])
            start += stride
        # the last one ends with the document
        found += [document[-length:]] if length <= len(document) else []
    return found


def test_windows_are_those_of_each_document_alone(tmp_path):
    random = np.random.default_rng(0)
    for case in range(200):
        lengths = random.integers(0, 12, random.integers(1, 6))
        documents = [random.integers(0, 99, length).tolist() for length in lengths]
        length, stride = (int(number) for number in random.integers((1, 0), (7, 9)))
        expected = naive(documents, length, stride or length)
        directory = saved(tmp_path / str(case), documents, None, vocabulary=99)
        if not expected:
            with pytest.raises(ValueError, match=r"length must be at most|is empty"):
                open_tokens(directory, length=length, stride=stride)
            continue
        data = open_tokens(directory, length=length, stride=stride)
        assert everything(data) == expected, (documents, length, stride)
        assert (len(data), data.length, data.vocabulary) == (len(expected), length, 99)
        assert data.characters_per_token == 1
        rows = torch.from_numpy(random.integers(0, len(data), 5))
        assert data.batch(rows)["token"].tolist() == [expected[row] for row in rows]


@pytest.mark.parametrize("vocabulary", [2**16, 2**16 + 1, 2**31 - 1])
def test_every_id_of_a_vocabulary_is_read_back(tmp_path, vocabulary):
    document = [0, vocabulary - 1, min(vocabulary - 1, 2**15), 5]
    data = open_tokens(saved(tmp_path, [document], None, vocabulary), length=4)
    sent = []
    batch = data.batch(torch.tensor([0, 0]), lambda tensor: sent.append(tensor) or tensor)
    assert batch["token"].tolist() == [document, document]
    assert batch["token"].dtype == torch.int64
    # what travels is as narrow as the file
    assert sent[0].element_size() == (2 if vocabulary == 2**16 else 4)


def test_a_batch_of_none_is_empty_and_no_file_is_mapped(tmp_path):
    data = open_tokens(saved(tmp_path), length=3)
    assert data.batch(torch.tensor([], dtype=torch.int64))["token"].shape == (0, 3)
    assert everything(data) == [[1, 2, 3], [3, 4, 5], [6, 7, 8]]
    assert everything(open_tokens(tmp_path, "test", length=3)) == [[9, 10, 11]]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_windows_cost_memory_by_the_document_and_not_by_the_token():
    windows = Windows(np.array([2**40, 2**41]), 1024, 1)
    assert len(windows) == 2 * (2**40 - 1023)
    last = np.array([0, len(windows) // 2 - 1, len(windows) // 2, len(windows) - 1])
    assert windows.starts(last).tolist() == [0, 2**40 - 1024, 2**40, 2**41 - 1024]


# digests


def other_token(directory):
    numbers = np.fromfile(directory / "train.bin", "<u2")
    numbers[-2] += 1
    numbers.tofile(directory / "train.bin")


def other_ends(directory):
    np.array([4, 8]).tofile(directory / "train.ends")


def other_vocabulary(directory):
    told = json.loads((directory / "tokens.json").read_text())
    (directory / "tokens.json").write_text(json.dumps(told | {"vocabulary": 28}))


@pytest.mark.parametrize("change", [other_token, other_ends, other_vocabulary])
def test_a_digest_knows_the_tokens_again_and_any_change_of_them(tmp_path, change):
    before = digest(open_tokens(saved(tmp_path / "a"), length=2))
    moved = (tmp_path / "a").rename(tmp_path / "b")
    assert digest(open_tokens(moved, length=2)) == before and len(before) == 16
    assert digest(open_tokens(moved, length=3)) != before
    assert digest(open_tokens(moved, length=2, stride=1)) != before
    change(moved)
    assert digest(open_tokens(moved, length=2)) != before


def test_of_a_large_file_evenly_spaced_pieces_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE", 4)
    monkeypatch.setattr(digest_module, "WHOLE_BYTES", 3 * 4 * 2)
    documents = [np.arange(26)]  # 7 pieces, of which 3 are read
    before = digest(open_tokens(saved(tmp_path / "a", documents), length=2))
    seen = []
    for place in range(26):
        (other := documents[0].copy())[place] = 26
        seen.append(digest(open_tokens(saved(tmp_path / f"{place}", [other]), length=2)) != before)
    assert [piece for piece in range(7) if seen[4 * piece]] == [0, 2, 4]
    assert seen == [place // 4 in (0, 2, 4) for place in range(26)]


# what cannot be used


def described(**changes):
    def change(directory):
        told = json.loads((directory / "tokens.json").read_text()) | changes
        left = {name: value for name, value in told.items() if value != "left out"}
        (directory / "tokens.json").write_text(json.dumps(left))

    return change


def with_ids(*ids):
    return lambda directory: np.array(ids, "<u2").tofile(directory / "train.bin")


def with_ends(*ends):
    return lambda directory: np.array(ends).tofile(directory / "train.ends")


def without(name):
    return lambda directory: (directory / name).unlink()


def nothing(directory):
    pass


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (nothing, {"split": "val"}, "split must be one of train, test, got val"),
        (nothing, {"length": 0}, "length must be at least 1, got 0"),
        (nothing, {"stride": -1}, "stride must be at least 0, got -1"),
        (nothing, {"vocabulary": 256}, r"that of .*, 27 ids of tokenizer own, got 256"),
        (nothing, {"tokenizer": "abc"}, "tokenizer must be that of .*, own , got abc"),
        (nothing, {"length": 6}, "length must be at most 5, as the longest document of the train"),
        (without("tokens.json"), {}, r"has no tokens.json: expected .* tokenize` has finished"),
        (without("train.bin"), {}, r"file .*train.bin is missing"),
        (without("train.ends"), {}, r"file .*train.ends is missing"),
        (with_ids(1, 2, 3), {}, r"train.bin must have 16 bytes, as tokens.json says, got 6"),
        (with_ids(1, 2, 3, 4, 28, 99, 7, 8), {}, r"train.bin has id 28 at token 4: expected"),
        (with_ids(1, 2, 3, 4, 5, 6, 7, 27), {}, r"id 27 at token 7, which is the mask token"),
        (with_ends(0, 8), {}, "train.ends must rise from above 0 to the number of tokens, 8"),
        (with_ends(5, 5), {}, "must rise"),
        (with_ends(5, 9), {}, "must rise"),
        (with_ends(9, 8), {}, "must rise"),
        (described(version=2), {}, "expected version 1, got 2"),
        (described(version="left out"), {}, "tokens.json is no description of tokens: 'version'"),
        (described(more=1), {}, r"no description of tokens: .*more"),
        (described(hash="left out"), {}, "no description of tokens: 'hash'"),
        (described(tokenizer=3), {}, "tokenizer must be str, got 3"),
        (described(vocabulary=True), {}, "vocabulary must be int, got True"),
        (described(vocabulary=0), {}, "vocabulary must be at least 1, got 0"),
        (described(vocabulary=2**31), {}, "vocabulary must be at most"),
        (described(end_of_text=27), {}, "end_of_text must be at most 26, got 27"),
        (described(end_of_text="a"), {}, "end_of_text must be a whole number, got 'a'"),
        (described(dtype="uint32"), {}, "dtype must be one of uint16, got uint32"),
        (described(splits={}), {}, "splits must be train, test, got"),
        (described(splits={"train": {}, "val": {}}), {}, "splits must be train, test, got"),
        (described(splits={"train": {"tokens": -8, "documents": 2}}), {}, "tokens must be a whole"),
        (described(splits={"train": {"tokens": 8}}), {}, "no description of tokens"),
        (described(splits={"train": {"tokens": 0, "documents": 0}}), {}, "bin must have 0 bytes"),
    ],
)
def test_rejects(tmp_path, change, options, message):
    change(saved(tmp_path))
    with pytest.raises(ValueError, match=message) as raised:
        open_tokens(tmp_path, **{"length": 2} | options)
    assert "\n" not in str(raised.value) and not isinstance(raised.value, MissingSplit)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_a_description_that_is_none_is_one_sentence(tmp_path, content):
    (tmp_path / "tokens.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokens.json is no description of tokens: "):
        open_tokens(tmp_path, length=2)


def test_a_split_that_is_missing_or_empty_is_said(tmp_path):
    with pytest.raises(MissingSplit, match=r"has no test split: tokens.json names \['train'\]"):
        open_tokens(saved(tmp_path / "a", test=None), "test", length=2)
    with pytest.raises(ValueError, match=r"test.bin is empty: the test split has no text"):
        open_tokens(saved(tmp_path / "b", test=[]), "test", length=2)


def test_an_id_that_no_check_at_the_start_saw_is_found_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE", 2)
    monkeypatch.setattr(tokens_module, "CHECKED", 2)
    with_ids(1, 2, 3, 27, 5, 6, 7, 8)(saved(tmp_path))
    data = open_tokens(tmp_path, length=2)
    assert data.batch(torch.tensor([0, 3]))["token"].tolist() == [[1, 2], [6, 7]]
    with pytest.raises(ValueError, match=r"train.bin has id 27 at token 3, which is .* \[0, 27\)"):
        data.batch(torch.tensor([0, 1, 2]))


def test_a_file_that_is_cut_short_while_it_is_in_use_is_named(tmp_path):
    data = open_tokens(saved(tmp_path), length=2)
    os.truncate(tmp_path / "train.bin", 4)
    assert data.batch(torch.tensor([0]))["token"].tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"train.bin was cut short while it was in use"):
        data.batch(torch.tensor([1]))


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        ({"test": []}, {}, "splits must be train, test, got"),
        ({"train": [[1], [2, 28]]}, {}, "document 1 of train has id 28 at token 1: expected"),
        ({"train": [[1], [2, 27]]}, {}, "document 1 of train has id 27 at token 1, which is the"),
        ({"train": [[-1]]}, {}, "document 0 of train has id -1 at token 0: expected"),
        ({"train": [[0.5]]}, {}, r"document 0 of train must be \(N,\) integers, got .* float64"),
        ({"train": [[[1]]]}, {}, r"document 0 of train must be \(N,\) integers, got \(1, 1\)"),
        ({"train": []}, {"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
        ({"train": []}, {"characters": {}}, r"characters must be of \['train'\], got \[\]"),
        ({"train": []}, {"end_of_text": 27}, "end_of_text must be at most 26, got 27"),
    ],
)
def test_tokens_that_cannot_be_written_are_refused_and_no_directory_is_finished(
    tmp_path, splits, options, message
):
    with pytest.raises(ValueError, match=message):
        write_tokens(tmp_path / "a", splits, **{"vocabulary": 27} | options)
    assert not (tmp_path / "a" / "tokens.json").exists()


def test_a_directory_may_say_how_many_characters_its_text_has(tmp_path):
    splits = {"train": [[1, 2, 3, 4]], "test": [[5, 6]]}
    write_tokens(tmp_path, splits, vocabulary=7, characters={"train": 18, "test": 5})
    told = [open_tokens(tmp_path, split, length=2).characters_per_token for split in splits]
    assert told == [4.5, 2.5]


def test_tokens_are_never_written_over(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"directory must have no tokens yet, got .*tokens.json"):
        saved(tmp_path, [[3]])
    assert everything(open_tokens(tmp_path, length=3)) == [[1, 2, 3], [3, 4, 5], [6, 7, 8]]
