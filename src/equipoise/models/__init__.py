"""All that touches a language model."""
