"""The command line: one file per verb, flags from its dataclass."""
