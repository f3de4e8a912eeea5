"""Blocks off the device, and their way there and back."""
