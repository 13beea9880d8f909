"""``python -m tests.benchmarks.contenders NAME SHAPE BASE``: one contender in a process, as one JSON line."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

from tests.benchmarks.contenders import ABLATIONS, CONTENDERS
from tests.benchmarks.shapes import SHAPES


def main(name: str, shape: str, base: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    train = (CONTENDERS | ABLATIONS)[name].train()  # its own imports first: unsloth wants to come before transformers
    from tests.benchmarks.contenders.job import Job

    job = Job(Path(base), SHAPES[shape])
    train(job)
    figures = job.figures()
    if name in ABLATIONS and not train.alone:  # its memory is noted already
        figures["times_ours"] = train.beside_ours(job)
    print(json.dumps(figures))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
