"""Corpora in, what units do on them out: a stream of windows through the model, in bounded memory."""
