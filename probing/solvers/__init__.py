"""Solvers: many L2 logistic regressions on the rows of one cell, fitted at once."""
