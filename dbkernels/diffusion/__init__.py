"""Arithmetic on noise levels; knows no module and no data."""
