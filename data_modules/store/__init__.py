"""The feature store: writing, reading, checksums and encodings. It knows no task."""
