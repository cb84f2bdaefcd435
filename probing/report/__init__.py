"""Report: what was found in a capture, as one HTML page that needs nothing else."""
