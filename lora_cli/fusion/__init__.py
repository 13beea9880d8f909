"""How a model of transformers is run fast: without padding, in fused forms, with its head folded into the loss."""
