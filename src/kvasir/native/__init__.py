"""Machine code: built once per machine, into the user's cache, and used only as long as it belongs to these sources.

`build` compiles what runs for every request (brains, simulator, messenger) from the Python sources, by mypyc; `load` finds it,
and otherwise the sources run, with the same results. `cpp` compiles C++.
"""
