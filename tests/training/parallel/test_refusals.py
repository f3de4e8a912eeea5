"""What several processes cannot do together is refused by its name, before anything is trained."""

from dataclasses import replace
from functools import partial

import pytest
from several import Launched, met
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from training.parallel.agreeing import Case
from training.parallel.runs import RUN
from training.tiny import CPU, make_data

from dbkernels.training.parallel.job import ALONE, Axis, Job, launched, open_job
from dbkernels.training.parallel.place import TOGETHER
from dbkernels.training.run import train

GROUP = object()  # of nobody: what is refused is so before any word is sent
PAIR = Job(1, data=Axis(0, 2), group=GROUP)
SHARING_LAYERS = Job(1, tensor=Axis(0, 2), group=GROUP)
IN_BACKWARD = {"optimizer_in_backward": True, "clip": 0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"cuda_graphs": True},
            "cuda_graphs must be off with 2 processes, whose graphs .*, got",
        ),
        (IN_BACKWARD, "optimizer_in_backward must be off with 2 processes, .* alone, got on"),
        ({"compile_stem_and_head": True}, "compile_stem_and_head must be off with 2 processes"),
        (CPU, "offload must be none with 2 processes, which train one block, got cpu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("job", [PAIR, SHARING_LAYERS], ids=["data", "tensor"])
def test_what_only_one_process_does(settings, message, job):
    with pytest.raises(ValueError, match=message):
        Case(trainer=settings).trainer_of(job)


def test_every_setting_has_a_case():
    assert TOGETHER.keys() == {"cuda_graphs", "optimizer_in_backward", "compile_stem_and_head"}


@pytest.mark.parametrize(
    ("job", "settings", "message"),
    [
        (PAIR, {"shard": True, "optimizer": "muon"}, "optimizer must be adamw .*, got muon"),
        (SHARING_LAYERS, {"optimizer": "muon"}, "optimizer must be adamw .*, got muon"),
        (PAIR, {"batch_size": 7}, "multiple of the 2 processes that share a batch, got 7"),
        (
            PAIR,
            {"batch_size": 4, "accumulate": 4},
            "multiple of the 2 processes that share a batch times 4 micro-batches, got 4",
        ),
    ],
)
def test_what_processes_that_share_batches_or_layers_cannot_do(job, settings, message):
    with pytest.raises(ValueError, match=message):
        Case(trainer=settings).trainer_of(job)


@pytest.mark.parametrize(
    ("job", "settings", "message"),
    [
        (PAIR, {"shard": True}, "shard must be off with model.layers.1.*Tensor, got on"),
        (SHARING_LAYERS, {}, "tensor_parallel must be 1 with model.layers.1.*Tensor, got 2"),
    ],
)
def test_weights_of_few_bits_are_not_cut(job, settings, message):
    case = Case(trainer=settings)
    blocks = case.config().build("cpu", only=1)
    quantize_(blocks.model.layers[1], Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=message):
        case.config().trainer_of(blocks, make_data(), job=job)
    # each may hold them all
    case = Case(trainer={"shard": False})
    assert case.config().trainer_of(blocks, make_data(), job=PAIR).placements.job is PAIR


def test_several_models_have_no_layers_to_share_out():
    pair = Job(data=Axis(0, 2, GROUP), group=GROUP)
    with pytest.raises(
        ValueError, match=r"several blocks must not be trained by one .*, got 3: tr"
    ):
        Case(block=None, trainer={"shard": True}).trainer_of(pair)


def test_a_weight_that_is_no_mean_over_samples_is_not_shared_out(monkeypatch):
    config = replace(Case().config(), weighting="published")
    monkeypatch.setattr(Case, "config", lambda case: config)
    with pytest.raises(ValueError, match="weighting must not be published with 2 processes that"):
        Case().trainer_of(PAIR)
    # those that share a layer have all samples
    monkeypatch.setattr("dbkernels.training.parallel.place.cut_layer", lambda layer, group: None)
    Case().trainer_of(SHARING_LAYERS)


def test_one_process_may_have_all_of_it():
    for settings in (IN_BACKWARD, CPU, {"shard": True, "optimizer": "muon"}):
        assert Case(trainer=settings).trainer_of(Job(1)).placements.job.group is None
    assert Case(trainer={"batch_size": 7}).trainer_of(Job(1)).placements.job.count == 1


@pytest.mark.parametrize(("rank", "expected"), [(0, slice(0, 3)), (2, slice(6, 9))])
def test_a_share_is_of_samples_that_follow_one_another(rank, expected):
    job = Job(data=Axis(rank, 3), tensor=Axis(1, 2))
    assert job.share(9) == job.share(9, 3) == expected
    assert (job.count, job.is_first) == (6, False)
    assert ALONE.share(5, 5) == slice(0, 5) and ALONE.is_first


# where processes meet


def test_who_was_launched_by_nobody_is_alone():
    assert not launched()
    with open_job("cpu", blocks=3) as job:
        assert (job.block, job.count, job.group) == (None, 1, None)
    with open_job("cpu", block=2) as job:
        assert job.block == 2
    with (
        pytest.raises(ValueError, match="tensor_parallel must be 1 for one process, got 2"),
        open_job("cpu", tensor=2),
    ):
        pass


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"blocks": 3}, "multiple of 3 .blocks side by side 3, tensor_parallel 1., got 4"),
        (
            {"blocks": 2, "tensor": 3},
            "multiple of 6 .blocks side by side 2, tensor_parallel 3",
        ),
        ({"block": 1, "blocks": 3, "tensor": 3}, "multiple of 3 .blocks side by side 1, ten"),
        ({"tensor": 0}, "tensor_parallel must be at least 1, got 0"),
    ],
)
def test_processes_that_cannot_be_shared_out(monkeypatch, told, message):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), open_job("cpu", **told):
        pass


def differing(make, what, rank):
    """A run that is another on the second process."""
    config, options = make("vit"), {}
    if rank and what == "configuration":
        config = replace(config, mirror=True)
    if rank and what == "save_every":
        options = {"save_every": 2}
    with met(block=0) as job:
        train(config, RUN, device="cpu", job=job, **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("configuration", "the configuration of the run must be the same on all 2 processes, got "),
        ("save_every", "save_every must be the same on all 2 processes, got another on rank 1"),
    ],
)
def test_processes_that_were_told_different_things_all_say_which_of_them(
    make_copies, tmp_path, what, message
):
    found = Launched(partial(differing, make_copies, what), 2, tmp_path / "printed").ended()
    assert [each.code for each in found] == [1, 1]
    for each in found:
        (line,) = [x for x in each.err.splitlines() if x.startswith("ValueError")]
        assert message in line and line.endswith("got another on rank 1 than on rank 0")
    assert not RUN.exists()
