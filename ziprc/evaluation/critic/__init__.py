"""What a critic in context knows, beside what its context says without any network."""
