"""Probes, tasks, grids and pictures, fitted from captures."""
