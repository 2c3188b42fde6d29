"""The machinery of declarations: what a stage is, what follows from all of them, and how an artifact came to be."""
