"""What `transformers` and `mauve` offer of what is used here, in memory."""

from types import ModuleType, SimpleNamespace

import torch
from torch import nn

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran"]


class Bigrams(nn.Module):
    """A language model that looks at the last word alone; its weights are of half the bytes."""

    def __init__(self, config):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        table = torch.randn(config.vocab_size, len(WORDS), generator=random)
        self.config, self.table = config, nn.Parameter(table.half())

    def forward(self, input_ids):
        assert not self.training and not torch.is_grad_enabled()
        assert self.table.dtype == torch.float32
        return SimpleNamespace(logits=self.table[input_ids])


def transformers(**config):
    """A package whose folders have one model.

    Args:
        config:  of the model, but for its vocabulary
    """
    kept = SimpleNamespace(**{"vocab_size": len(WORDS), **config})

    def tokenizer(text, *, add_special_tokens, verbose):
        assert not add_special_tokens and not verbose
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def opens(made):
        def from_pretrained(folder, *, local_files_only):
            assert local_files_only
            if not (folder / "config.json").exists():
                raise OSError(f"there is no config.json\n  in {folder.name}")
            return made()

        return SimpleNamespace(from_pretrained=from_pretrained)

    module = ModuleType("transformers")
    module.AutoTokenizer = opens(lambda: tokenizer)
    module.AutoModelForCausalLM = opens(lambda: Bigrams(kept))
    return module


def mauve(calls):
    """A package that notes what it is asked for; its score is a quarter."""

    def compute_mauve(*, p_features, q_features, num_buckets, mauve_scaling_factor, seed, verbose):
        assert not verbose
        calls.append((p_features, q_features, num_buckets, mauve_scaling_factor, seed))
        return SimpleNamespace(mauve=p_features.dtype.type(0.25))

    module = ModuleType("mauve")
    module.compute_mauve = compute_mauve
    return module
