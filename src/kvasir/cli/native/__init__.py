"""The simulator, and the brains that it runs, as machine code: built once per machine by mypyc, into the user's cache.

It is used only as long as it was built from exactly the sources that are here; otherwise these run. Both give the same
results.
"""
