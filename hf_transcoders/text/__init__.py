"""Strict JSON and YAML, plain-text tables, and text that is safe to print or to put into Markdown."""
