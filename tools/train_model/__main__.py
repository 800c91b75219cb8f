"""`python -m tools.train_model --text DIR --out DIR`: trains the built-in checkpoint.

`--text` is a folder of `.rst` or `.txt` files that may be used freely. The shipped weights were made from the CPython
documentation sources: the Debian package `python3.11-doc` (`apt-get download python3.11-doc; dpkg -x *.deb DIR`, below
`usr/share/doc/python3.11/html/_sources`), or `Doc/` of a CPython checkout.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads starve the neighbours

from tools.train_model.training import Settings, train


def main() -> None:
    """Parses the flags and trains."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_model", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of .rst or .txt files")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--minutes", type=float, default=60.0, help="processor minutes per thread; the schedule fits itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="checkpoint directory to go on from (its tokenizer is kept)")
    parser.add_argument("--begin", type=float, default=0.0, help="share of the schedule to skip, with --start")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model, to see that it runs")
    flags = parser.parse_args()
    train(
        Settings(
            text=flags.text,
            out=flags.out,
            minutes=flags.minutes,
            seed=flags.seed,
            threads=flags.threads,
            start=flags.start,
            begin=flags.begin,
            smoke=flags.smoke,
        )
    )


if __name__ == "__main__":
    main()
