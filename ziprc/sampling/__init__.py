"""Adaptive sampling: how much more to spend, and on what."""
