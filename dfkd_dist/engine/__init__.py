"""The one training loop, and all that turns a recipe into a run and a run into results."""
