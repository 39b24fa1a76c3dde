"""Talking to a trained GPT: text generation."""
