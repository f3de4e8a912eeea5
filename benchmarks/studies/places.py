"""Where the data of a study are; nothing is ever downloaded."""

from dataclasses import dataclass
from pathlib import Path

from dbkernels.data.idx import fashion

BUILT_IN = ("digits", "fashion")  # names that `dbkernels train --data` knows
SHAKESPEARE = Path("runs/shakespeare/tokens")
GIVEN = {  # what a path must be given for, and what lies there
    "cifar100": "CIFAR-100's files",
    "tiny-imagenet": "Tiny-ImageNet, a folder of images of each class or an .npz",
    "cifar10": "CIFAR-10's files",
    "latents": "latents of ImageNet with their labels, as `train` reads .npy files",
    "text8": "text8's tokens, which `dbkernels tokenize` writes",
    "lm1b": "LM1B's tokens in 32,000 words, which `dbkernels tokenize` writes",
    "owt": "OpenWebText's tokens in 32,000 words, which `dbkernels tokenize` writes",
}


@dataclass(frozen=True)
class Places:
    """Paths of data by name, as they were given: `name=path`."""

    given: dict[str, str]

    @classmethod
    def of(cls, words: tuple[str, ...]) -> "Places":
        """Of the command line's words.

        Raises:
            ValueError: a word is none, or its name is unknown or there twice.
        """
        pairs = [word.partition("=")[::2] for word in words]
        given = dict(pairs)
        if len(given) < len(pairs):
            raise ValueError(f"data must name each place once, got {' '.join(words)}")
        known = (*BUILT_IN, "shakespeare", *GIVEN)
        for name, path in given.items():
            if name not in known or not path:
                raise ValueError(
                    f"data must be NAME=PATH with a name of {', '.join(known)}, got "
                    f"{name}{'=' * bool(path)}{path}"
                )
        return cls(given)

    def __getitem__(self, name: str) -> str:
        """What `dbkernels train --data` takes.

        Raises:
            ValueError: nobody gave a path, or the data are not there; says what to do.
        """
        if name in self.given:
            return self.given[name]
        if name == "fashion":
            fashion()
        if name in BUILT_IN:
            return name
        if name == "shakespeare":
            if not (SHAKESPEARE / "tokens.json").is_file():
                raise ValueError(
                    f"shakespeare must be tokens in {SHAKESPEARE}, got none: "
                    f"`python tools/shakespeare.py --out {SHAKESPEARE}` writes them"
                )
            return str(SHAKESPEARE)
        raise ValueError(
            f"data must name a path for {name}, got none: --data {name}=PATH of {GIVEN[name]}"
        )
