"""What is made from what: one torch-free declaration per stage, one module per system."""
