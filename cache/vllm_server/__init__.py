"""Captures from an engine that others drive: vLLM's server, or an engine that a user built."""
