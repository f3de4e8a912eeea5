"""Data from local files; knows no model and no trainer."""
