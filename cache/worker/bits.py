"""Bits: a tensor's memory as NumPy can hold it."""

import numpy as np
import torch


def as_bits(tensor: torch.Tensor) -> np.ndarray:
    """A host tensor without a copy: bfloat16 as uint16 bits, because NumPy has no bfloat16; others as they are."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
