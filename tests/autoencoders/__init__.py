"""Tests of neuron_lens.autoencoders."""
