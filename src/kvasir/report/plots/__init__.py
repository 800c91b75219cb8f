"""Plots of a run as inline SVG: matplotlib draws, the page's own colours apply, so light and dark both read well."""
