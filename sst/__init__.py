"""Scalable Semantic Transfer (SST) for human parsing over multiple label domains."""
