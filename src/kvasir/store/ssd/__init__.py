"""The bytes of the SSD tier: a file of equal places (`SsdFile`), and the threads that write and read it (`SsdWorkers`)."""

from kvasir.store.ssd.figures import SsdQueues, SsdStats
from kvasir.store.ssd.file import SsdFile, open_ssd
from kvasir.store.ssd.layout import places_that_fit
from kvasir.store.ssd.requests import SsdOutcome, SsdRead, SsdWrite
from kvasir.store.ssd.workers import SsdWorkers

__all__ = ["SsdFile", "SsdOutcome", "SsdQueues", "SsdRead", "SsdStats", "SsdWorkers", "SsdWrite", "open_ssd", "places_that_fit"]
