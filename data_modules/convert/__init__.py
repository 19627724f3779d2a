"""Download and conversion of published data: features, annotations and corpora."""
