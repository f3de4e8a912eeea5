"""What trains without one backward through the whole network: the paper's rivals, and others.

All have the same data, optimizer and updates of every layer, on a transformer and on the CNN of
NoProp. Plain and checkpointed end to end have the same figures but for memory and time.
"""

from dataclasses import replace

from baselines import BASELINES

from studies.arm import Arm
from studies.scales import SETTINGS, Scale
from studies.study import Study, arm, settings

NETWORKS = {"vit": "ViT", "cnn": "CNN"}
# of an answer of those that take 1000 in the papers
STEPS = {"tiny": 50, "small": 100, "paper": 1000}
OWN = {  # flags of those that need others
    "forward-forward": "--lr 4e-3",
    "contrastive forward-forward": "--order sequential",
}


def _arms(scale: Scale) -> list[Arm]:
    return [rival(scale, network, name) for network, name in BASELINES]


def rival(scale: Scale, network: str, name: str) -> Arm:
    """A baseline with the settings of the first classifier, or of the CNN where it has its own."""
    setting = SETTINGS[scale].get("cnn" if network == "cnn" else "vit", settings(scale, "vit"))[0]
    own = arm("vit", setting, f"{name}, {NETWORKS[network]}", OWN.get(name, ""))
    return replace(own, baseline=(network, name), steps=STEPS[scale])


STUDY = Study(_arms)
