"""What the inner steps of an inversion's round are called in timings."""

SYNTHESIS, HARVEST, ASSISTANT = "synthesis", "harvest", "assistant"
"""Images are optimised; they go to the pool; assistants learn from the pool."""
