"""What DiffusionBlocks is compared with: each is blocks and an objective of the Trainer."""

from baselines.baseline import Baseline, CNNConfig
from baselines.contrastive import Contrastive
from baselines.diffusion_blocks_cnn import DiffusionBlocksCNN
from baselines.diffusion_blocks_vit import DiffusionBlocksViT, Unconditioned
from baselines.end_to_end import Checkpointed, EndToEndCNN, EndToEndViT
from baselines.forward_forward import ForwardForward
from baselines.greedy import Greedy
from baselines.noprop_ct import NoPropCT
from baselines.noprop_dt import NoPropDT
from baselines.noprop_fm import NoPropFM

ON_VIT = (
    EndToEndViT,
    Checkpointed,
    DiffusionBlocksViT,
    Unconditioned,
    Greedy,
    ForwardForward,
    Contrastive,
    NoPropDT,
    NoPropCT,
    NoPropFM,
)
ON_CNN = (EndToEndCNN, DiffusionBlocksCNN, NoPropDT, NoPropCT, NoPropFM)
# by the name of the network and that of the row
BASELINES: dict[tuple[str, str], type[Baseline]] = {
    **{("vit", each.name): each for each in ON_VIT},
    **{("cnn", each.name): each for each in ON_CNN},
}

__all__ = ["BASELINES", "Baseline", "CNNConfig"]
