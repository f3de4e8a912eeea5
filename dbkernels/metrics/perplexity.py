"""How likely texts are to somebody else's language model, and how varied they are.

    perplexity = exp(-mean of log p(token | the tokens before it in its text))

A text that repeats itself has a low perplexity, so the number says nothing without how varied the
texts are.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dbkernels.metrics.needed import needed
from dbkernels.settings import check_number

NGRAM = 4  # tokens whose repetition counts


class GenerativePerplexity(NamedTuple):
    """What a language model says of texts.

    perplexity:  of a token, all texts together; lower is likelier
    entropy:     of the tokens of a text, in nats, as a mean over texts; a loop has little
    distinct:    share, in (0, 1], of all runs of NGRAM tokens that are different; texts that repeat
                 themselves or each other have little
    """

    perplexity: float
    entropy: float
    distinct: float


def generative_perplexity(
    texts: Sequence[str],
    model: str | Path,
    *,
    length: int | None = None,
    device: torch.device | str = "cpu",
) -> GenerativePerplexity:
    """Perplexity of texts under a causal language model, beside how varied they are.

    The model is read from a local folder, with `transformers`; nothing is downloaded and no code of
    the folder is run. Texts are read one at a time in float32, and their first tokens are not
    counted: no token is before them.

    Args:
        texts:   each of two tokens or more
        model:   folder of the model and its tokenizer, as `save_pretrained` writes them
        length:  tokens of a text that are read, at least 2; None is as many as the model can read
        device:  where the model runs
    Raises:
        ValueError: `transformers` is missing, the folder has no such model, or a text is too short.
    """
    if length is not None:
        check_number("length", length, 2)
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of at least one text, got {texts!r:.40}")
    tokenizer, network = _opened(Path(model))
    network = network.to(device).float().eval()
    most = getattr(network.config, "max_position_embeddings", None)
    if length is not None and most is not None:
        check_number("length", length, 2, most)
    nats, rows = 0.0, []
    for place, text in enumerate(texts):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = tokens[: length or most]
        if len(tokens) < 2:
            raise ValueError(
                f"texts must each have two tokens or more, got {text!r:.40} at place {place}"
            )
        if max(tokens) >= network.config.vocab_size:
            raise ValueError(
                f"model must know every token of its tokenizer, got {max(tokens)} and a vocabulary "
                f"of {network.config.vocab_size}"
            )
        rows.append(tokens)
        nats += _nats(network, torch.tensor([tokens], dtype=torch.int64, device=device))
    perplexity = math.exp(nats / sum(len(row) - 1 for row in rows))
    return GenerativePerplexity(perplexity, _entropy(rows), _distinct(rows))


def _opened(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and network of a folder."""
    if not folder.is_dir():
        raise ValueError(f"model must be a folder of a causal language model, got {folder}")
    library = needed("transformers", "transformers", "generative perplexity", "text")
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = library.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library has no narrower one
        raise ValueError(
            f"model must be a folder of a causal language model and its tokenizer, got {folder}: "
            f"{' '.join(str(error).split()):.200}"
        ) from error
    return tokenizer, network


@torch.no_grad()
def _nats(network: Any, tokens: Tensor) -> float:
    """Nats of all tokens (1, T) but the first."""
    logits = network(input_ids=tokens).logits[0, :-1].float()
    return float(F.cross_entropy(logits, tokens[0, 1:], reduction="sum"))


def _entropy(rows: Sequence[Sequence[int]]) -> float:
    found = 0.0
    for row in rows:
        counts = torch.tensor(row, dtype=torch.int64).unique(return_counts=True)[1]
        shares = counts.double() / len(row)
        found -= float((shares * shares.log()).sum())
    return found / len(rows)


def _distinct(rows: Sequence[Sequence[int]]) -> float:
    # a shorter text counts as one run
    runs = [tuple(row[i : i + NGRAM]) for row in rows for i in range(max(1, len(row) - NGRAM + 1))]
    return len(set(runs)) / len(runs)
