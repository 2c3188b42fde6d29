"""One module per rule of the Snakefile: read, call, write."""
