"""Every number of the command line has bounds: nonsense is a sentence in time, or it is right."""

import shutil
import signal

import pytest
from cli.runs import SIZES
from fuzz.cli import flags

from dbkernels.cli.evaluate import Evaluate
from dbkernels.cli.plan import Plan
from dbkernels.cli.profile import Profile
from dbkernels.cli.sample import Sample
from dbkernels.cli.tokenize import Tokenize
from dbkernels.cli.train import Train

SECONDS = 20
ONE = "--preset digits --batch 2 --num-blocks 1 --methods block_fused --recompute none"
COMMANDS = {
    Train: f"train vit --out out --data data.npz {' '.join(SIZES)}",
    Sample: "sample dit --out x.png --per-class 1 --levels 2 --device cpu",
    Evaluate: "evaluate vit --levels 2 --device cpu",
    Tokenize: "tokenize text.txt --out out --tokenizer bytes --documents line --processes 1",
    Profile: f"profile {ONE} --offload none --device cpu",
    Plan: "plan --memory 1GiB --preset digits --batch 2",
}
VALUES = ["-1", "0", str(2**62), "nan", "inf", "1e300"]
ALLOWED = {  # where a value means something
    "0": {
        # the preset's own, none, or as it was asked for
        *("patch", "dim", "depth", "num_heads", "label_drop", "shift", "gamma", "warmup"),
        *("weight_decay", "clip", "ema", "steps_per_swap", "seed", "save_every", "mean", "budget"),
        *("threads", "processes", "workers", "test_share", "train_bpe"),
        *("Train.length", "Train.stride", "distill", "lora", "lora_alpha"),
    },
    "-1": {"mean"},
    str(2**62): {"seed", "gamma"},
    "1e300": {"gamma"},  # each block is trained on the whole range
}
NUMBERS = [(verb, name) for verb in COMMANDS for name, kind in flags(verb) if kind in (int, float)]


class Hung(BaseException):
    pass


@pytest.fixture
def in_time():
    """Ends a test that takes longer than anybody waits."""

    def hung(number, frame):
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_every_verb_that_takes_a_number_is_here():
    assert {verb for verb, _ in NUMBERS} == set(COMMANDS) and len(NUMBERS) > 30


@pytest.mark.parametrize(
    ("verb", "name"), NUMBERS, ids=[f"{verb.__name__}-{name}" for verb, name in NUMBERS]
)
def test_nonsense_for_a_number_is_one_sentence_in_time(cli, runs, tmp_path, in_time, verb, name):
    for family in ("vit", "dit"):
        (tmp_path / family).symlink_to(runs(family))
    (tmp_path / "text.txt").write_text("one\ntwo\n")
    for value in VALUES:
        in_time()
        ended = cli(f"{COMMANDS[verb]} --{name.replace('_', '-')}={value}")
        signal.alarm(0)
        if {name, f"{verb.__name__}.{name}"} & ALLOWED.get(value, set()):
            assert ended.code == 0, (value, ended)
            shutil.rmtree("out", ignore_errors=True)
            continue
        assert ended.code in (1, 2), (value, ended)
        assert ended.code == 2 or ended.err.splitlines()[-1].startswith("error: "), (value, ended)
        assert ended.err.count("error: ") <= 1
