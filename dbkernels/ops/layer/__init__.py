"""A whole transformer layer as one autograd function."""
