"""Measures of what a model made or said; knows no model of this package."""

from dbkernels.metrics.calibration import calibration_error
from dbkernels.metrics.frechet import frechet_distance
from dbkernels.metrics.manifolds import PrecisionRecall, precision_recall
from dbkernels.metrics.mauve import mauve_score
from dbkernels.metrics.perplexity import GenerativePerplexity, generative_perplexity

__all__ = [
    "GenerativePerplexity",
    "PrecisionRecall",
    "calibration_error",
    "frechet_distance",
    "generative_perplexity",
    "mauve_score",
    "precision_recall",
]
