"""Prompts and preference pairs, one loader per source."""
