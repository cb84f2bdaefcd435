"""The service: a lake over HTTP. Reads, computes what is missing, and never answers whom it does not know. No torch.

Who may be hostile, and what then holds, says SECURITY.md.
"""
