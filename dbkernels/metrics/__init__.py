"""Measures of what a model made or said; knows no model of this package."""

from dbkernels.metrics.frechet import frechet_distance
from dbkernels.metrics.manifolds import PrecisionRecall, precision_recall

__all__ = ["PrecisionRecall", "frechet_distance", "precision_recall"]
