"""Recipes: each builds a model, a space and an axis, in a page, and calls the trainer."""
