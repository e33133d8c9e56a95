"""The one exception that a user is meant to see."""


class UserError(Exception):
    """A mistake in what the user gave: one line that names the key, the value and the fix (exit code 2)."""
