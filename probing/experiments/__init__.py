"""The experiments of "LLMs Know More Than They Show" (arXiv:2410.02707), by any model."""
