from dataclasses import replace

import torch
from models.tiny import CONFIGS, DRAW, LEVEL, make_batch, make_model, randomise

from dbkernels.models import ViT
from dbkernels.models.baseline import use_baseline

CONFIG = CONFIGS["vit"]


def test_target_and_estimate_are_rows_of_unit_length():
    model = make_model("vit")
    rows = model.label_table.weight / model.label_table.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.target(make_batch(model)), rows[[3, 0, 2]])
    logits = torch.randn(3, 5)
    probability = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(model.estimate(logits), probability @ rows)


def kept_widths(model, layers):
    """Numbers for each sample in what autograd keeps, apart from parameters."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size() // len(LEVEL)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.losses(DRAW, LEVEL, layers, make_batch(model))
    return [width for address, width in saved.items() if address not in weights]


def test_the_last_layer_keeps_of_one_token_all_but_keys_and_values():
    tokens, hidden = 5, 17  # a width like no other
    model = randomise(ViT(replace(CONFIG, mlp_hidden=hidden)))
    for layers in ((0,), (0, 1), (0, 1, 0)):
        widths = kept_widths(model, layers)
        assert widths.count(tokens * hidden) == len(layers) - 1
        assert widths.count(hidden) == 1


def test_the_last_layers_tokens_are_not_kept_for_the_one_that_answers():
    model, x = make_model("vit"), 5 * CONFIG.dim
    fused = kept_widths(model, (0,)).count(x)
    use_baseline(model, "checkpointed")
    assert fused == kept_widths(model, (0,)).count(x) == 1


def test_norms_have_weights_only_if_asked():
    names = {"norm.weight", "norm.bias", "layers.0.norm1.weight", "layers.1.norm2.bias"}
    assert names <= set(ViT(CONFIG).state_dict())
    plain = ViT(replace(CONFIG, affine=False))
    assert not any("norm" in name for name in plain.state_dict())
