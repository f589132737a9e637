"""HookedModel: ask for activations, ablations and patches declaratively, over batches and data sets."""
