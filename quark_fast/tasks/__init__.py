"""The built-in tasks, and rewards by name."""
