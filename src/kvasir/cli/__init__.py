"""The command line. Whoever imports it runs the simulator as machine code, where that was built."""

from kvasir.cli.native.load import use

use()
