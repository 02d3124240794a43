"""Layers, and what XLA must be told about them."""
