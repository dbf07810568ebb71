"""PagedCache: keys and values of a model in pages."""
