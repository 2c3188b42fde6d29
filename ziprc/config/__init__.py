"""The settings of every experiment."""
