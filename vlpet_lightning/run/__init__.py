"""A run among others: its folder, how it goes on, whom its ranks and signals tell what."""
