"""Checkpoints whose hashes are right and whose contents no trainer of the run has written."""

import copy
import hashlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from dbkernels.training import checkpoint
from dbkernels.training.run import load_run

RUN = Path("run")
GROUPS = ("model", "ema", "optimizer")


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def filled(value):
    def change(tensors, name):
        return {**tensors, name: torch.full_like(tensors[name], value)}

    return change


def cast(dtype):
    return lambda tensors, name: {**tensors, name: tensors[name].to(dtype)}


TENSORS = {
    "none": without,
    "nan": filled(torch.nan),
    "inf": filled(-torch.inf),
    "int8": cast(torch.int8),
    "float64": cast(torch.float64),
    "long": lambda tensors, name: {**tensors, name: tensors[name].new_zeros(7, 7)},
    "more": lambda tensors, name: {**tensors, "neck": torch.zeros(1)},
    "nothing": lambda tensors, name: {},
}


@pytest.fixture
def crafted(make_config, train):
    """Tries to use a checkpoint after a change of it: to resume, and to load."""
    config = make_config("vit", ema=0.9)
    train(config)
    path = checkpoint.latest(RUN / "checkpoints")
    good = checkpoint.load(path)

    def refusals(change):
        tensors, state = change(*copy.deepcopy(good))
        checkpoint.save(path.parent, int(path.name.removeprefix("step-")), tensors, state)
        for use in (lambda: train(config, resume="latest"), lambda: load_run(RUN, device="cpu")):
            with pytest.raises(ValueError) as caught:
                use()
            yield str(caught.value)

    return refusals


@pytest.mark.parametrize("group", GROUPS)
def test_tensors_that_a_trainer_does_not_save_are_refused(crafted, group):
    for kind, change in TENSORS.items():

        def changed(tensors, state, change=change):
            name = sorted(tensors[group])[-1]
            return {**tensors, group: change(tensors[group], name)}, state

        resumed, *loaded = crafted(changed) if group == "model" else [next(crafted(changed))]
        assert all(said.startswith(f"{group} ") for said in (resumed, *loaded)), kind
        assert " must be " in resumed


def places(counters, at=()):
    for key, value in counters.items():
        yield from places(value, (*at, key)) if isinstance(value, dict) else [(*at, key)]


@pytest.mark.parametrize("number", [-1, 2.5, "2", None, True, [], 1e300])
def test_counts_that_a_trainer_does_not_save_are_refused(crafted, number):
    def changed(tensors, state, at):
        *outer, last = at
        place = state["counters"]
        for key in outer:
            place = place[key]
        place[last] = number
        return tensors, state

    _, state = checkpoint.load(checkpoint.latest(RUN / "checkpoints"))
    every = list(places(state["counters"]))
    assert ("step",) in every and ("groups", "block0") in every
    for at in every:
        said = next(crafted(partial(changed, at=at)))
        assert at[-1] in said and "must be a whole number from 0" in said


@pytest.mark.parametrize("name", ["config", "counters"])
@pytest.mark.parametrize("value", [None, 5, [], "text", {}])
def test_a_state_that_a_run_does_not_save_is_refused(crafted, name, value):
    for said in crafted(lambda tensors, state: (tensors, {**state, name: value})):
        assert said
        if name == "counters" and value == {}:
            break  # which whoever loads weights does not read


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("step", value) for value in (-1, "2", None, 2.0)),
        *(("state", value) for value in (None, [], 5)),
        *(("files", value) for value in (None, [], {"../x.safetensors": {}}, {"x": 5})),
        ("files", {"model.safetensors": {"bytes": 5}}),
        ("files", {"model.safetensors": {"bytes": "5", "sha256": "x"}}),
    ],
)
def test_a_manifest_of_other_types_is_refused_whatever_its_hash_says(tmp_path, name, value):
    path = checkpoint.save(tmp_path, 2, {"model": {"w": torch.zeros(1)}}, {})
    manifest = json.loads((path / "state.json").read_bytes())
    del manifest["self"]
    manifest[name] = value
    manifest["self"] = hashlib.sha256(checkpoint.as_json(manifest)).hexdigest()
    (path / "state.json").write_bytes(checkpoint.as_json(manifest))
    with pytest.raises(ValueError, match=f"{name} as `save` writes it"):
        checkpoint.load(path)
