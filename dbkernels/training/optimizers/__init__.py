"""Optimizers: what a trainer may step parameters with."""
