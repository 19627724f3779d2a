"""Feature shards and annotations at URLs, with a node-local cache."""
