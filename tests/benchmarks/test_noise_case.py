import pytest
import torch

CPU = torch.device("cpu")
IMPLS = ("fused", "eager")


@pytest.fixture
def noise_case(bench):
    return bench("noise_case")


def make_case(noise_case, op, shape=(5, 1, 4, 4), impls=IMPLS):
    return noise_case.NoiseCase(op, shape, torch.float32, impls, CPU)


def test_every_implementation_has_the_noise_that_it_should(noise_case):
    case = make_case(noise_case, "add_noise", (4, 20_000))
    z0, sigma, _ = inputs = case.inputs()
    scale = (sigma**2 + 0.25).sqrt()[:, None]
    for (call,) in case.calls([inputs]).values():
        noise = (call() * scale - z0) / sigma[:, None]
        assert noise.std(1) == pytest.approx(torch.ones(4), abs=0.03)


def test_the_losses_of_one_noise_agree(noise_case):
    case = make_case(noise_case, "score_loss")
    z0, sigma, prediction = case.inputs()
    draw = noise_case.draw_on(CPU)
    noise = noise_case.ops.normals(draw, 5, 16).view(5, 1, 4, 4)
    z = z0 + sigma.view(-1, 1, 1, 1) * noise
    eager = noise_case._eager_loss(prediction, z, z0, sigma)
    fused = noise_case._loss(draw, prediction, None, z0, sigma)
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-6)


def test_before_and_after_the_network_give_its_input_and_the_predictions_gradient(noise_case):
    case = make_case(noise_case, "noise_and_loss")
    inputs = case.inputs()
    for (call,) in case.calls([inputs]).values():
        scaled, (gradient,) = call()
        assert scaled.shape == gradient.shape == inputs[0].shape and gradient.any()


@pytest.mark.parametrize(("op", "passes"), [("add_noise", 2), ("score_loss", 3)])
def test_bytes_are_those_of_the_tensors_that_must_be_touched(noise_case, op, passes):
    assert make_case(noise_case, op).bytes_moved("fwd+bwd") == passes * 5 * 16 * 4


def test_a_row_names_what_ran_its_op(noise_case, monkeypatch):
    monkeypatch.setattr(noise_case.ops, "implementation", lambda device, op: f"{op} on {device}")
    case = make_case(noise_case, "noise_and_loss")
    assert case.implementation("fused", "fwd+bwd") == "score_loss_fwd on cpu"
    assert case.implementation("compiled", "fwd+bwd") == "inductor"
