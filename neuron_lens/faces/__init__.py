"""Interfaces people already know, laid thinly over the engine: translation, no model arithmetic."""
