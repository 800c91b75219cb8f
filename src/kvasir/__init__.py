"""Kvasir: KVCache-centric, disaggregated LLM serving."""
