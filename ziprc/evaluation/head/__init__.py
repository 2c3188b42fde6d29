"""The study of the head: what it predicts, and how well."""
