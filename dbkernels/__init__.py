"""Train deep residual transformers one block at a time."""
