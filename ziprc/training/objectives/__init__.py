"""A loss is a pure function from one typed bundle to a `Loss`."""
