"""The only places that generate: token ids in, token ids (and joint readout) out."""
