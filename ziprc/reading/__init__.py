"""A model's states on given tokens: the joint, log-probabilities, entropies."""
