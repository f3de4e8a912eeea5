"""The only room that knows both layers and noise intervals."""
