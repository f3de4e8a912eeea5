"""Layers that stand in the place of other people's, one file for each class or shape of it."""
