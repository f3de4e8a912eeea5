"""Recurrent depth in one pass instead of many, with as many updates or as much arithmetic."""

from studies.families import recurrent
from studies.study import Study

STUDY = Study(recurrent)
