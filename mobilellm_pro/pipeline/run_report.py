"""The `report` verb: a run of a pipeline as one static page.

    mobilellm-pro report train_configs/debug/pipeline.toml

Everything is read from what the phases have left, nothing is computed again, and nothing but two files is written: it
can be made while the pipeline runs.
"""

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.pipeline.phases import load_pipeline
from mobilellm_pro.pipeline.run_report_page import run_page
from mobilellm_pro.pipeline.run_report_record import RunReport, make_run_report

PAGE, RECORD = "report.html", "report.json"


def report(pipeline: str, *, output: str | None = None) -> RunReport:
    """Write report.html and report.json of a pipeline: phases, loss curves, tokens, mix, merge, needles, sizes.

    The page is one file for any browser, without scripts. It can be made at any time of a run: what is not there yet is
    named.

    Args:
        pipeline: TOML file with the phases.
        output: folder of the run, in which the files are written; default: the file's.

    Returns:
        what report.json holds.

    Raises:
        ConfigError: everything that is wrong with the file.
        ValueError: a phase has left a file that is damaged.
    """
    loaded = load_pipeline(pipeline, output)
    found = make_run_report(loaded)
    paths = [path for part in (found.mixes, found.merges) for one in part.values() for path in one["plots"]]
    page = run_page(found, {path: (loaded.output / path).read_bytes() for path in paths})
    loaded.output.mkdir(parents=True, exist_ok=True)
    write_atomically(loaded.output / RECORD, found.to_json())
    write_atomically(loaded.output / PAGE, page)
    print(loaded.output / PAGE)
    return found
