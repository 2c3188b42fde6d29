"""How a file comes to be whole, and where it is kept."""
