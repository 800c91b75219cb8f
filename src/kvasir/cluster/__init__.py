"""The live bodies: pool, instance and conductor processes, and who starts them."""
