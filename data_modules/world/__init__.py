"""A synthetic world of coloured shapes: scenes, clips, and questions, statements and captions about them."""
