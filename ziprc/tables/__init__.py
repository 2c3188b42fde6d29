"""What a row means: one module a table."""
