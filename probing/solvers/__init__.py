"""Solvers: many logistic regressions on the rows of one cell, fitted at once."""

from hiddenlake.cache.errors import HiddenlakeError

try:
    import torch as torch
except ImportError as error:
    raise HiddenlakeError(
        "fitting probes needs torch, which is not installed: pip install 'hiddenlake[probes]'"
    ) from error
