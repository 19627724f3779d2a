"""The benchmark's annotation files, read into rows of samples."""
