"""Golden vectors of the model families, and the runner that checks any folder of them."""
