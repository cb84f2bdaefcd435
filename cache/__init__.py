"""Capture and store: what is read inside a model, and how it lands on disk."""
