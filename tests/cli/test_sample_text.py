"""Text on the command line: prompts, what is printed as it is drawn, and what is written."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from cli.runs import SIZES, read_tree, refused

from dbkernels.cli import printing
from dbkernels.cli.main import main
from dbkernels.cli.sample_text import RULE, _Growing
from dbkernels.data.token_files import write_tokens
from dbkernels.data.tokenizer import encoded, hash_of, open_tokenizer, save_tokenizer
from dbkernels.training.generated_text import GeneratedText

WORDS = "the quick brown fox jumps over the lazy dog and goes home " * 8
LENGTH = 16  # tokens of a window
FAMILIES = ["ar", "mdm", "huginn", "ar --objective conventional --num-blocks 1"]


def write_text(directory, name):
    tokenizer = open_tokenizer(name)
    told = {"vocabulary": tokenizer.vocabulary, "tokenizer": name, "hash": hash_of(tokenizer)}
    write_tokens(directory, {"train": [encoded(tokenizer, WORDS)]}, **told)
    save_tokenizer(tokenizer, directory)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The directory of a run of a family with more flags, trained once a module."""
    root = tmp_path_factory.mktemp("text")
    for name in ("text8", "bytes"):
        write_text(root / name, name)

    @cache
    def trained(line, data):
        out, (family, *flags) = root / f"{line}{data}".replace(" ", ""), line.split()
        sizes = f"--preset small --length {LENGTH} --lr 0.03 --out {out} --data {root / data}"
        main(["train", family, *sizes.split(), *SIZES, *flags])
        return out

    return lambda line, data="text8": trained(line, data)


@pytest.fixture
def sample(cli, written):
    """What a run of a family prints."""

    def run(flags="", family="ar", data="text8"):
        done = cli(f"sample {written(family, data)} --device cpu {flags}")
        assert done.code == 0, done
        return done

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_goes_on_from_its_prompt_as_the_seed_decides(sample, family):
    # past the end of a window
    line = f"--prompt the --length {2 * LENGTH} --top-p 0.9"
    a, b, c = (sample(f"{line} --seed {seed}", family).out for seed in (0, 0, 1))
    assert a == b != c
    assert a.startswith("the") and a.endswith("\n") and len(a) == 3 + 2 * LENGTH + 1
    assert set(a[:-1]) <= set("abcdefghijklmnopqrstuvwxyz ")
    assert len(sample("--length 5", family).out) == 6


def test_a_prompt_is_as_the_tokenizer_reads_it(sample):
    assert sample("--prompt The!2 --length 1").out.startswith("the two")
    Path("prompt.txt").write_text("Größe \n")
    assert sample("--prompt-file prompt.txt --length 2", data="bytes").out.startswith("Größe \n")


@pytest.mark.parametrize("family", FAMILIES)
def test_several_texts_have_rules_between_and_each_is_as_if_alone(sample, family):
    line = "--prompt fox --length 6 --batch 2"
    texts = sample(f"{line} --samples 3 --prompt dog", family).out.split(f"{RULE}\n")
    assert [text[:3] for text in texts] == 3 * ["fox"] + 3 * ["dog"]
    assert len(set(texts)) == 6 and all(len(text) == 10 for text in texts)
    assert sample(line, family).out == texts[0]


def test_a_file_has_what_would_be_printed(sample):
    line = "--prompt fox --length 6 --samples 2"
    done = sample(f"{line} --out x.txt")
    assert done.out == "wrote 2 texts: x.txt\n"
    assert Path("x.txt").read_text() == sample(line).out


class Cut(KeyboardInterrupt):
    pass


@pytest.fixture
def interrupted(monkeypatch, capsys):
    """Texts of which two tokens are drawn; what was printed before each."""

    def tokens(text):
        for number in (1, 2):
            seen.append(capsys.readouterr().out)
            yield torch.full((len(text.prompt), 1), number)
        seen.append(capsys.readouterr().out)
        raise Cut

    seen = []
    monkeypatch.setattr(GeneratedText, "__iter__", tokens)
    return seen


def test_a_text_is_seen_as_it_is_drawn_and_stays_where_it_is_cut(cli, written, interrupted):
    done = cli(f"sample {written('ar')} --prompt fox --device cpu --time")
    # the prompt, and each token before the next
    assert interrupted == ["fox", "a", "b"]
    assert (done.code, done.out, done.err) == (130, "\n", "")


def test_a_file_that_is_cut_short_is_not_there(cli, written, interrupted):
    assert cli(f"sample {written('ar')} --out x.txt --device cpu").code == 130
    assert {path.name for path in Path().iterdir()} == {"data.npz"}


def test_the_time_is_told_beside_the_text(sample):
    done = sample("--length 5 --samples 2 --time")
    tokens, told = done.err.splitlines()[-1].split(" in ", 1)
    assert tokens == "10 tokens" and "tokens/s" in told
    # 2 L D numbers of 4 bytes for each token of two windows, BOS, and the noisy one
    assert f"cache: {2 * 3 * 16 * 4 * (LENGTH + 1) * 2} bytes" in told
    assert "cache: none" in sample("--length 5 --time", "mdm").err


class Letters:
    """A tokenizer whose 0 ends a text."""

    end_of_text = 0

    def decoder(self):
        return self

    def more(self, ids):
        return "".join(" abc"[number] for number in ids)

    def rest(self):
        return "."


def test_nothing_follows_the_end_of_a_text():
    text = _Growing(Letters())
    assert [text.more(ids) for ids in ([1, 2], [3, 0, 1], [2])] == ["ab", "c", ""]
    assert text.ended and text.tokens == 4 and text.rest() == "."


class Screen:
    encoding = "ascii"

    def __init__(self, terminal):
        self.text, self.terminal = "", terminal

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(
    ("terminal", "shown"), [(True, "a\tb\n??[2J\n"), (False, "a\tb\r\n?\x1b[2J\n")]
)
def test_a_text_does_nothing_to_a_terminal_and_fits_its_encoding(monkeypatch, terminal, shown):
    monkeypatch.setattr(sys, "stdout", Screen(terminal))
    with printing.printing() as write:
        write("a\tb\r\nä\x1b[2J")
    assert sys.stdout.text == shown


def test_who_has_read_enough_of_a_text_gets_no_error():
    code = """if True:
        from dbkernels.cli.printing import printing
        with printing() as write:
            while True:
                write("more ")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.read(10) == b"more more "
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 128 + 13


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ar --prompt !!!", "prompt must have something that the tokenizer text8 can read, got"),
        ("ar --prompt a\udcff", "prompt must be UTF-8, got a byte that is not at character 1"),
        ("ar --prompt-file latin.txt", "latin.txt must be UTF-8, got byte 0xff at 3"),
        ("ar --prompt-file none.txt", "No such file or directory: none.txt"),
        (f"ar --prompt {LENGTH * 'a'}", f"fewer tokens than the model's window, {LENGTH}, got"),
        # none of the texts is drawn before all prompts are read
        (f"ar --prompt a --prompt {LENGTH * 'a'}", "fewer tokens than the model's window"),
        ("ar --temperature 0", "temperature must be above 0 with the bridge sample, which"),
        ("ar --temperature nan", "temperature must be finite and at least 0, got nan"),
        ("ar --top-p 1.5", "top_p must be in (0, 1], got 1.5"),
        ("ar --top-p 0", "top_p must be in (0, 1], got 0.0"),
        ("ar --stop 9", "stop must be from 0.05 to less than 8.0, got 9.0"),
        ("ar --levels 0", "levels must be at least 1, got 0"),
        ("ar --length 0", "length must be at least 1, got 0"),
        ("ar --samples 0", "samples must be at least 1, got 0"),
        ("ar --out x.png", "out must end in .txt for text, got x.png"),
        ("ar --out no/x.txt", "out must lie in a directory that exists, got no/x.txt"),
        ("ar --per-class 2", "per_class must not be given for a run of ar, got 2"),
        ("mdm --bridge soft", "bridge must not be given where no token starts as noise, got soft"),
        ("mdm --stop 0.2", "stop must not be given where tokens are unmasked, got 0.2"),
        ("mdm --grid karras", "spacing of masked tokens must be cdf or cosine, got karras"),
        (
            f"{FAMILIES[-1]} --levels 2",
            "levels must not be given for a run that was trained without",
        ),
        (f"{FAMILIES[-1]} --grid cdf", "grid must not be given for a run that was trained without"),
        (
            f"{FAMILIES[-1]} --bridge soft",
            "bridge must not be given where no token starts as noise",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(cli, written, tmp_path, line, message):
    family, flags = next((f, line[len(f) :]) for f in FAMILIES[::-1] if line.startswith(f))
    (tmp_path / "latin.txt").write_bytes(b"Gro\xff")
    before = read_tree(tmp_path)
    assert refused(cli(f"sample {written(family)} --device cpu --out x.txt {flags}"), message)
    assert read_tree(tmp_path) == before


def test_a_run_of_images_has_no_prompt(cli, runs):
    assert refused(cli(f"sample {runs('dit')} --prompt a"), "prompt must not be given for a run of")


def test_a_model_has_the_vocabulary_of_its_tokenizer(cli, written, tmp_path):
    run = written("ar")
    save_tokenizer(open_tokenizer("bytes"), run)
    try:
        refusal = cli(f"sample {run} --device cpu")
    finally:
        save_tokenizer(open_tokenizer("text8"), run)
    assert refused(refusal, "must have the model's vocabulary, 27 ids, got 256")


@pytest.mark.parametrize("family", ["ar", "mdm", "huginn"])
def test_a_run_writes_without_its_data_for_it_keeps_their_tokenizer(cli, written, family):
    run = written(family)
    data, elsewhere = run.parent / "text8", run.parent / "moved"
    assert (run / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    data.rename(elsewhere)
    try:
        done = cli(f"sample {run} --device cpu --length 4")
    finally:
        elsewhere.rename(data)
    assert done.code == 0 and done.out, done
