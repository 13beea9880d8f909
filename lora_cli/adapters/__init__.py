"""Low-rank adapters: the layer, how it begins, where it goes, its files, and how it is merged."""
