"""Everybody's weights: layouts, files, and what they tell."""
