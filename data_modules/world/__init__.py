"""A small world of coloured shapes: its scenes, and what can be said about them."""
