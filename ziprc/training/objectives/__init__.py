"""A loss is a pure function from typed tensors to a `Loss`, sums over the labelled positions that it was given."""
