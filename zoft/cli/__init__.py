"""Offer the console script."""

from zoft.cli.main import main

__all__ = ["main"]
