"""Run lifecycle: output folder, resuming, signals, and agreement between ranks."""
