"""Images in: preprocessing that travels with a model, and streams of labelled pictures."""
