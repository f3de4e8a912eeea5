"""The paper's comparisons, each a list of arms that are trained and measured in the same way."""

from studies import (
    blocks,
    conditioning,
    conversion,
    families,
    huginn,
    layer_sweep,
    noise,
    overlap,
    partition,
    rivalry,
    sharing,
    text,
    weighting,
)
from studies.arm import Arm
from studies.places import Places
from studies.running import Job
from studies.scales import Scale
from studies.study import Study

__all__ = ["STUDIES", "Arm", "Job", "Places", "Scale", "Study"]

STUDIES: dict[str, Study] = {
    "families": families.STUDY,
    "more-data": families.MORE_DATA,
    "blocks": blocks.STUDY,
    "partition": partition.STUDY,
    "overlap": overlap.STUDY,
    "weighting": weighting.STUDY,
    "sharing": sharing.STUDY,
    "conditioning": conditioning.STUDY,
    "baselines": rivalry.STUDY,
    "layer-sweep": layer_sweep.STUDY,
    "huginn": huginn.STUDY,
    "text": text.STUDY,
    "noise": noise.STUDY,
    "conversion": conversion.STUDY,
}
