"""hiddenlake: activations of language models, captured while they generate, stored in Zarr, probed."""
