"""The embedded engine for Hugging Face checkpoints, on torch."""
