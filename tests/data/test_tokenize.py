"""Text files become a directory of tokens: the same however they are cut, and however it stops."""

import gzip
import json
import os
import random
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from cli.runs import read_tree
from fuzz.forked import forked

from dbkernels.data import text_files, token_parts
from dbkernels.data import tokenize as module
from dbkernels.data.text_files import CUTS
from dbkernels.data.token_files import read_description
from dbkernels.data.tokenize import TokenizeConfig, tokenize
from dbkernels.data.tokenizer import encoded, open_tokenizer, tokenizer_of
from dbkernels.data.tokens import open_tokens

WORDS = ["one", "two2", "Three", "日本", "é", "-", ".", "x y", "\t"]
SPACES = [" ", " ", "\n", "\n", "\n\n", "\r\n", " \n \t\n", "  "]
UNIT = 96  # bytes, in place of many millions


def texts(draw, count):
    for _ in range(count):
        size = draw.randrange(1, 120)
        yield "".join(draw.choice(WORDS) + draw.choice(SPACES) for _ in range(size))


@pytest.fixture
def small(monkeypatch):
    """Cuts files into tiny units and pieces."""

    # a disk that keeps what it has takes most of the time
    monkeypatch.setattr(os, "fsync", lambda number: None)

    def cut(unit=UNIT, piece=16, tail=8):
        for where, name, number in (
            (text_files, "UNIT", unit),
            (module, "UNIT", unit),
            (text_files, "PIECE", piece),
            (text_files, "TAIL", tail),
        ):
            monkeypatch.setattr(where, name, number)

    cut()
    return cut


def config(root, **settings):
    given = {"inputs": (root / "text",), "out": root / "out", "tokenizer": "bytes"}
    return TokenizeConfig(**given | {"processes": 1} | settings)


def saved(root, documents):
    (root / "text").mkdir(exist_ok=True)
    for name, text in documents.items():
        (root / "text" / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def split_of(out, split="train"):
    told = read_description(out)
    ids = np.fromfile(out / f"{split}.bin", told.dtype)
    ends = np.fromfile(out / f"{split}.ends", "<i8")
    counts = told.splits[split]
    assert (counts.tokens, counts.documents) == (len(ids), len(ends))
    return [document.tolist() for document in np.split(ids, ends)[:-1]]


def naive(texts, documents):
    """The documents of whole files."""
    if documents == "file":
        return texts
    found = []
    for text in texts:
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        if documents == "line":
            found += lines
            continue
        for line, before in zip(lines, ["", *lines], strict=False):
            if line.strip() and before.strip():
                found[-1] += f"\n{line}"
            elif line.strip():
                found.append(line)
    return found


@pytest.mark.parametrize("documents", ["file", "line", "blank"])
@pytest.mark.parametrize("tokenizer", ["bytes", "text8"])
def test_a_directory_has_the_tokens_of_every_document(tmp_path, small, documents, tokenizer):
    draw, made = random.Random(f"{documents} {tokenizer}"), open_tokenizer(tokenizer)
    for case in range(12):
        (root := tmp_path / str(case)).mkdir()
        files = dict(
            zip(("a.txt", "b.txt", "c.txt"), texts(draw, draw.randrange(1, 4)), strict=False)
        )
        small(piece=draw.choice([7, 16, 50]))
        settings = {"tokenizer": tokenizer, "documents": documents}
        tokenize(config(saved(root, files), **settings))
        expected = [encoded(made, text).tolist() for text in naive([*files.values()], documents)]
        expected = [ids for ids in expected if ids]
        assert split_of(root / "out") == expected, files
        read = open_tokens(root / "out", length=1)
        told = sum(len(made.decode(ids)) for ids in expected) / sum(map(len, expected))
        assert read.characters_per_token == pytest.approx(told)
        # joined, with what stands between documents
        tokenize(config(root, out=root / "joined", join=True, **settings))
        between = list(made.separator)
        whole = [number for ids in expected for number in [*between, *ids]][len(between) :]
        assert split_of(root / "joined") == [whole]
        counts = read_description(root / "joined").splits["train"]
        assert counts.characters == len(made.decode(whole))


@pytest.mark.parametrize("documents", CUTS)
def test_a_file_is_cut_at_the_first_place_behind_a_unit_wherever_its_pieces_end(
    tmp_path, small, documents
):
    whole = "".join(texts(random.Random(7), 12)).encode()
    (path := tmp_path / "a.txt").write_bytes(whole)
    for unit, piece in product((20, 37, 96), (1, 7, 16)):
        small(unit=unit, piece=piece)
        units = list(text_files.units_of(path, documents, "text"))
        starts = [0]
        while found := CUTS[documents].search(whole, starts[-1] + unit):
            starts.append(found.end())
        # where a file ends, no unit begins
        starts = [start for start in starts if start < len(whole)]
        assert [each.start for each in units] == starts
        assert [each.stop for each in units] == [*starts[1:], len(whole)]


def test_a_bpe_is_trained_on_what_is_not_held_out(tmp_path):
    files = {"a.txt": "the theme of the theatre " * 40, "b.txt": "zzz zzz zzz " * 40, "c.txt": "é"}
    held_out = (saved(tmp_path, files) / "text" / "b.txt",)
    inputs = tuple(tmp_path / "text" / name for name in ("a.txt", "c.txt"))
    found = tokenize(config(tmp_path, inputs=inputs, test=held_out, tokenizer="", train_bpe=280))
    bpe = tokenizer_of(tmp_path / "out")
    assert found.vocabulary == bpe.vocabulary <= 280 and found.end_of_text == bpe.end_of_text == 0
    documents = split_of(tmp_path / "out")
    assert [bpe.decode(document) for document in documents] == [files["a.txt"], "é"]
    # each document ends, and none of them has words of the one that is held out
    assert found.splits["train"].characters == len(files["a.txt"]) + 1
    assert all(document[-1] == 0 and 0 not in document[:-1] for document in documents)
    assert len(encoded(bpe, "the theme")) < 5 and len(encoded(bpe, "zzz")) == 3
    # the end of a text stands between those that are joined
    settings = {"inputs": inputs, "join": True, "tokenizer": str(tmp_path / "out/tokenizer.json")}
    tokenize(config(tmp_path, out=tmp_path / "joined", **settings))
    assert split_of(tmp_path / "joined") == [
        [number for document in documents for number in document]
    ]


def test_every_kind_of_file_is_read_and_only_those_of_a_folder(tmp_path):
    objects = "".join(f"{json.dumps({'body': text, 'n': 1})}\n" for text in ("one\ntwo", "", "é"))
    files = {
        "a.jsonl": objects,
        "b.jsonl.gz": gzip.compress(objects.encode() + b" \n"),
        "c.txt": "\ufeffa\ufeff",  # the first is a mark of the order of bytes
        "d.txt.gz": gzip.compress(b"packed"),
        "e.md": "not read",
        "empty.txt": "",
    }
    saved(tmp_path, files)
    for name in (".git", "z"):
        saved(tmp_path, {})
        (tmp_path / "text" / name).mkdir()
        (tmp_path / "text" / name / "f.txt").write_text(f"in {name}")
    tokenize(config(tmp_path, field="body"))
    found = [bytes(document).decode() for document in split_of(tmp_path / "out")]
    assert found == ["one\ntwo", "é", "one\ntwo", "é", "a\ufeff", "packed", "in z"]
    named = tuple(tmp_path / "text" / name for name in ("e.md", "a.jsonl"))
    tokenize(config(tmp_path, inputs=named, out=tmp_path / "named", field="body"))
    assert split_of(tmp_path / "named")[0] == [*b"not read"]


@pytest.mark.parametrize("documents", ["file", "line"])
def test_a_share_of_the_documents_is_held_out(tmp_path, small, documents):
    lines = [f"document {number}" for number in range(200)]
    if documents == "file":
        saved(tmp_path, {f"{number:03}.txt": line for number, line in enumerate(lines)})
    else:
        saved(tmp_path, {"a.txt": "\n".join(lines[:150]), "b.txt": "\n".join(lines[150:])})
    tokenize(config(tmp_path, documents=documents, test_share=0.1))
    train, test = (
        [bytes(document).decode() for document in split_of(tmp_path / "out", split)]
        for split in ("train", "test")
    )
    assert sorted([*train, *test], key=lines.index) == lines
    # of each unit they are evenly spaced, from a place of its own
    assert len(test) == 20 if documents == "file" else 10 < len(test) < 30
    assert train == sorted(train, key=lines.index) and test == sorted(test, key=lines.index)


def test_several_processes_write_the_same_files(tmp_path):
    files = {f"{n}.txt": text for n, text in enumerate(texts(random.Random(4), 30))}
    saved(tmp_path, files)
    told = []
    one = config(tmp_path, tokenizer="text8", documents="blank", test_share=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "UNIT", 2000)
        tokenize(replace(one, processes=2), lambda *numbers: told.append(numbers))
        tokenize(replace(one, out=tmp_path / "one"))
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert len(told) > 3 and told == sorted(told) and told[-1][0] == told[-1][1]
    assert {total for _, total in told} == {sum(len(text.encode()) for text in files.values())}


# interrupted


def contents(directory):
    return {path.name: content for path, content in read_tree(directory).items()}


def test_killed_anywhere_it_goes_on_and_comes_to_the_same_files(tmp_path, small, monkeypatch):
    saved(tmp_path, dict(zip(("a.txt", "b.txt"), texts(random.Random(5), 2), strict=True)))
    whole = config(tmp_path, tokenizer="", train_bpe=270, documents="line", test_share=0.3)
    made, calls, documents_of = [], [], token_parts.documents_of
    monkeypatch.setattr(
        token_parts, "documents_of", lambda job: made.append(job.index) or documents_of(job)
    )
    monkeypatch.setattr(os, "fsync", calls.append)
    tokenize(whole)
    jobs, writes, expected = set(made), len(calls), contents(tmp_path / "out")
    assert len(jobs) > 3 and writes > 40

    def killed(config, number):
        left = iter(range(number))
        os.fsync = lambda descriptor: None if next(left, None) is not None else os._exit(9)
        tokenize(config)

    for number in range(0, writes - 1, 5):  # the last one is behind the name
        again = replace(whole, out=tmp_path / str(number))
        work = tmp_path / f"{number}.unfinished"
        assert forked(partial(killed, again, number)).code == 9
        assert work.exists() and not again.out.exists()
        with pytest.MonkeyPatch.context() as patch:
            if (work / "trained.txt").exists():
                patch.setattr(module, "train_bpe", None)  # which is not done again
            progress = work / "progress.json"
            appended = json.loads(progress.read_text())["done"] if progress.exists() else 0
            parts = {int(path.stem) for path in work.glob("*.json") if path.stem.isdecimal()}
            made.clear()
            tokenize(again)
        assert sorted(made) == sorted(jobs - parts - set(range(appended)))
        assert contents(again.out) == expected and not work.exists()


def test_nothing_goes_on_behind_other_text_or_settings(tmp_path, small):
    saved(tmp_path, {"a.txt": "one two " * 30, "b.txt": "three four " * 30})
    first = config(tmp_path, documents="line")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(first, stop)
    before = read_tree(tmp_path / "out.unfinished")
    for other in ({"documents": "blank"}, {"tokenizer": "text8"}, {"test_share": 0.5}):
        with pytest.raises(ValueError, match=r"out.unfinished has the beginning of other text or"):
            tokenize(replace(first, **other))
    os.utime(tmp_path / "text" / "a.txt", (1, 1))
    with pytest.raises(ValueError, match=r"delete it, or give another out"):
        tokenize(first)
    after = read_tree(tmp_path / "out.unfinished")
    assert before == {path: after[path] for path in before}


def test_a_file_that_is_mended_goes_on_behind_those_before_it(tmp_path, small):
    saved(tmp_path, {"a.txt": b"one " * 30, "b.txt": b"two \xff " + b"three " * 20})
    with pytest.raises(ValueError, match=r"b.txt must be UTF-8, got invalid start byte at byte 4$"):
        tokenize(config(tmp_path))
    assert not (tmp_path / "out").exists() and (tmp_path / "out.unfinished").is_dir()
    saved(tmp_path, {"b.txt": b"two"})
    tokenize(config(tmp_path))
    assert split_of(tmp_path / "out") == [[*b"one " * 30], [*b"two"]]
    assert {path.name for path in tmp_path.iterdir()} == {"text", "out"}


def test_two_at_a_time_do_not_write_the_same_directory(tmp_path):
    again = config(saved(tmp_path, {"a.txt": "one"}))

    def while_it_works(done, total):
        with pytest.raises(ValueError, match=r"another process is at work in .*out.unfinished"):
            tokenize(again)

    tokenize(again, while_it_works)
    assert split_of(tmp_path / "out") == [[*b"one"]]


# what cannot be used


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": ""}, "one of tokenizer and train_bpe must be given, got none and 0"),
        ({"train_bpe": 300}, "one of tokenizer and train_bpe must be given, got bytes and 300"),
        ({"tokenizer": "", "train_bpe": 256}, "train_bpe must be at least 257, got 256"),
        ({"tokenizer": "words"}, "tokenizer must be bytes, text8 or the path of a JSON file, got"),
        ({"inputs": ()}, "inputs must name at least one file or folder, got none"),
        ({"inputs": ("none",)}, "file none is missing"),
        ({"inputs": ("folder",)}, "folder has no text: expected .txt, .jsonl, .txt.gz, .jsonl.gz"),
        ({"inputs": ("empty.txt",)}, "empty.txt is empty"),
        ({"inputs": ("text", "none")}, "file none is missing"),
        ({"test": ("none",)}, "file none is missing"),
        ({"test": ("text",), "test_share": 0.5}, "test_share must be 0 where test names files"),
        ({"test_share": 1.0}, r"test_share must be in \[0, 1\), got 1.0"),
        ({"test_share": -0.1}, r"test_share must be in \[0, 1\), got -0.1"),
        ({"test_share": 0.01}, "the test split has no text"),
        ({"documents": "page"}, "documents must be one of file, line, blank, got page"),
        ({"processes": -1}, "processes must be at least 0, got -1"),
        ({"out": "text"}, "out must not exist yet, or be an empty directory, got text"),
        ({"out": "text/a.txt"}, "out must not exist yet, or be an empty directory, got text/a"),
        ({"inputs": ("latin.txt",)}, "latin.txt must be UTF-8, got invalid continuation byte at b"),
        ({"inputs": ("cut.txt",)}, "cut.txt must be UTF-8, got unexpected end of data at byte 3$"),
        ({"inputs": ("latin.txt.gz",)}, "gz must be UTF-8, got .* at byte 19 of what it holds$"),
        ({"inputs": ("cut.txt.gz",)}, "cut.txt.gz cannot be read: Compressed file ended"),
        ({"inputs": ("none.gz",)}, "none.gz cannot be read: Not a gzipped file"),
        (
            {"inputs": ("no.jsonl",)},
            "each line of no.jsonl must be an object with a text 'te",
        ),
        ({"inputs": ("list.jsonl",)}, r"must be an object with a text 'text', got \[1\]$"),
        ({"inputs": ("other.jsonl",)}, r"with a text 'text', got {\"body\": \"a\"}$"),
        ({"inputs": ("number.jsonl",)}, r"with a text 'text', got {\"text\": 3}$"),
        ({"inputs": ("half.jsonl",)}, r"with a text 'text', got {\"text\": \"\\ud800\"}$"),
        ({"inputs": ("signs.txt",), "tokenizer": "text8"}, "the train split has no text"),
    ],
)
def test_rejects(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, {"a.txt": "some text"})
    (tmp_path / "folder").mkdir()
    latin = "0123456789 and naïve".encode("latin-1")
    files = {
        "empty.txt": b"",
        "latin.txt": latin,
        "cut.txt": "abcé".encode()[:-1],
        "latin.txt.gz": gzip.compress(b"\xc3\xa9" + latin),
        "cut.txt.gz": gzip.compress(b"some text")[:-4],
        "none.gz": b"none",
        "no.jsonl": b'{"text": "a"}\nnone\n',
        "list.jsonl": b"[1]",
        "other.jsonl": b'{"body": "a"}',
        "number.jsonl": b'{"text": 3}',
        "half.jsonl": b'{"text": "\\ud800"}',
        "signs.txt": b"-- ! --",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    before = read_tree(tmp_path)
    for name in ("inputs", "test"):
        if name in settings:
            settings = settings | {name: tuple(map(Path, settings[name]))}
    if "out" in settings:
        settings = settings | {"out": Path(settings["out"])}
    with pytest.raises(ValueError, match=message) as raised:
        tokenize(config(tmp_path, **settings))
    assert "\n" not in str(raised.value)
    assert read_tree(tmp_path) == before and not (tmp_path / "out.unfinished").exists()


# the second has no place between words, so that pieces end inside its characters
@pytest.mark.parametrize("text", ["é日 word\n" * 40, "é日w" * 40])
def test_the_place_of_what_is_not_utf8_is_that_in_the_file(tmp_path, small, text):
    text = text.encode()
    for place in range(0, len(text), 41):
        saved(tmp_path, {"a.txt": text[:place] + b"\xfe" + text[place:]})
        start = len(text[:place].decode(errors="ignore").encode())  # of a character that it cuts
        with pytest.raises(ValueError, match=rf"a.txt must be UTF-8, got .* at byte {start}$"):
            tokenize(config(tmp_path, out=tmp_path / str(place)))
