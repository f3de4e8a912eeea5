"""Several processes that train one model: their places, and what each of them holds."""
