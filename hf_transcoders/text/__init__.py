"""Text that comes from anywhere or goes anywhere: strict JSON and YAML, and text that is safe to print."""
