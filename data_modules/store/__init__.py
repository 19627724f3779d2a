"""The feature store: writing, reading, checksums and encodings, independent of any task."""
