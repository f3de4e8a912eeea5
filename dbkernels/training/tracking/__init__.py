"""Where else the rows of a run go: one file for each package that shows runs, and a registry."""
