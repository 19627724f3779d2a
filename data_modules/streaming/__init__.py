"""Streaming of feature shards and annotations from URLs, with a node-local cache."""
