"""Artefacts and weights to samplers."""
