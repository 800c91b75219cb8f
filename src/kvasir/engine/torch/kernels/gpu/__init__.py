"""The operations on a GPU, in Triton; imported only where Triton is."""
