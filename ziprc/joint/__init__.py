"""The joint head: its bins, its reserved rows in the vocabulary, and how it is saved and read."""
