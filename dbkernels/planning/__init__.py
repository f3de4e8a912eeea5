"""What a way of training needs, and which way fits; knows no family."""
