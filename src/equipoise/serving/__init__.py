"""Serving: one thread that owns the models, an OpenAI-compatible endpoint, and a page to feel the trade-off."""
