"""The study of samplers: accuracy against tokens, by replay and live."""
