"""docs/results.md from recipes: carries out the runs of a cells file one after another, and assembles their reports.

    python -m benchmarks.results [--data DIR] [--store URI] [--only NAME …] [--out docs/results.md] [--assemble]
                                 [--accept-licence gemma]

Run it from a checkout. `--data` holds the folders xquad-en, xquad-zh, torchhub and pubmedqa, each with corpus.jsonl
and questions.jsonl; runs that need one are recorded as failed without it. A run is `rayft index build`,
`rayft train lora`, `rayft release`, `rayft evaluate` and the like (benchmarks/results.yaml). What became of each is
kept in `--work`, so that the command, given again, goes on where it stopped and repeats nothing that is done. The page
is written after every run; what is not measured yet is shown as "not measured". `--only` takes names of runs or of
parts (`table`, `ablation`, …). `--assemble` only writes the page. The model of the Chinese run asks for
`--accept-licence gemma`. On a GPU: `--cells benchmarks/results_gpu.yaml`. An edited recipe, or an edited cell, is run
again; stages that it shares with an earlier run are not repeated.
Exit status 1 when a run failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results_cells import Run, read_cells
from benchmarks.results_page import write_page
from benchmarks.results_runs import Workplace, carry_out_next
from cluster.errors import UserError
from cluster.progress import complain, say
from cluster.store import Store
from evaluation.summary import REPORT_FORMAT


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    options = parse(arguments)
    try:
        runs = read_cells(options.cells)
        place = Workplace(options.work, Store(options.store), options.data, options.accept_licence)
        chosen = choose(runs, options.only)
        failed = []
        for number, run in enumerate([] if options.assemble else chosen, start=1):
            record = carry_out_next(place, run, REPORT_FORMAT, f"{number} of {len(chosen)}")
            failed += [record.name] if record.state == "failed" else []
            write_page(options.out, runs, place)
        if options.assemble:
            write_page(options.out, runs, place)
    except UserError as error:
        complain(f"results: {error}")
        return 2
    say(f"results: {options.out} is written" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--store", default=".rayft/store", help="artifact store")
    parser.add_argument("--work", type=Path, default=Path(".rayft/results"), help="records and logs of the runs")
    parser.add_argument("--cells", type=Path, default=Path(__file__).with_name("results.yaml"), help="the runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="runs or parts")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="the page")
    parser.add_argument("--accept-licence", default="", metavar="NAME", help="for optional models, such as gemma")
    parser.add_argument("--assemble", action="store_true", help="only write the page from what is done")
    return parser.parse_args(arguments)


def choose(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """The runs named, by their own name or by their part's.

    Raises:
        UserError: a name that is neither.
    """
    unknown = set(only) - {run.name for run in runs} - {run.part for run in runs}
    if unknown:
        raise UserError(f"--only: no run or part is named {min(unknown)}; runs: {', '.join(run.name for run in runs)}")
    return [run for run in runs if not only or run.name in only or run.part in only]


if __name__ == "__main__":
    sys.exit(main())
