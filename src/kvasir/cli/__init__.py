"""The command line. Whoever imports it runs machine code, where that was built."""

from kvasir.native.load import use

use()
