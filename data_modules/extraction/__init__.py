"""Images and videos of the user's own, encoded by open_clip into feature stores."""
