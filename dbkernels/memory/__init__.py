"""Bytes; knows no model."""
