"""Feature extraction from a user's own images and videos with open_clip."""
