"""Predicted seconds: model shapes, hardware, roofline and fitted cost models. Pure."""
