"""Data and rewards to artefacts."""
