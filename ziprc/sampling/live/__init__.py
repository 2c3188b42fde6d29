"""Adaptive sampling on a real engine."""
