"""Starting things: the rules of Snakemake, single stages, clusters, containers."""
