"""CPU kernels in C++, with torch fallbacks of the same meaning."""
