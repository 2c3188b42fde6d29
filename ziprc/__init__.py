"""ziprc: models that know how they are doing, and spend compute accordingly."""

__version__ = "0.1.0"
