"""How weights move: data, objectives, and the one trainer that runs them."""
