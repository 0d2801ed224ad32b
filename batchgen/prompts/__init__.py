"""Rows become prompts, completions become text."""
