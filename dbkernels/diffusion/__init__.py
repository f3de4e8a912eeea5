"""Arithmetic on noise levels and on the draws of `ops`; knows no module and no data."""
