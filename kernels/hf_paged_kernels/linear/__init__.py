"""Linear layers of decode steps."""
