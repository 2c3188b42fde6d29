"""Ways in from outside: a question asked in a terminal."""
