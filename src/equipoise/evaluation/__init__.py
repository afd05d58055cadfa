"""Sweeps, statistics of fronts, and the report."""
