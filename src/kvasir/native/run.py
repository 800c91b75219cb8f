"""`python -m kvasir.native.run MODULE ARGUMENT ...`: as `python -m MODULE ...`, on machine code where it was built."""

import runpy
import sys

from kvasir.native.load import use

if __name__ == "__main__":
    use()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
