"""What trains without one backward through the whole network: the paper's rivals, and others.

All have the same data, optimizer and updates of every layer, on a transformer and on the CNN of
NoProp. Plain and checkpointed end to end have the same figures but for memory and time.
"""

from dataclasses import replace

from baselines import BASELINES

from studies.arm import Arm
from studies.scales import Scale, Setting
from studies.study import Study, arm, settings

NETWORKS = {"vit": "ViT", "cnn": "CNN"}
OWN = {  # flags of those that need others
    "forward-forward": "--lr 4e-3",
    "contrastive forward-forward": "--order sequential",
}


def _arms(scale: Scale) -> list[Arm]:
    return [
        rival(setting, network, name)
        for setting in settings(scale, "vit")[:1]
        for network, name in BASELINES
    ]


def rival(setting: Setting, network: str, name: str) -> Arm:
    """A baseline with the settings of the classifiers."""
    own = arm("vit", setting, f"{name}, {NETWORKS[network]}", OWN.get(name, ""))
    return replace(own, baseline=(network, name))


STUDY = Study(_arms)
