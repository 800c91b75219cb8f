"""The command `python -m kvasir.engine.torch.kernels.build`: build the C++ kernels now, not at the first load."""

import sys
import time

from kvasir.engine.torch.kernels.compile import KernelsUnavailableError, build


def main() -> int:
    """Build and say where in one line; exit status 1 where there can be no kernels."""
    start = time.perf_counter()
    try:
        library = build()
    except KernelsUnavailableError as error:
        print(f"no kernels: {error}")
        return 1
    print(f"kernels at {library} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
