"""report.html: one file that shows a run and needs no network; the page of `lowmem-rlhf watch` with the data in it."""

from pathlib import Path

from lowmem_rlhf.files import atomic_write, writing
from lowmem_rlhf.page.html import whole_page
from lowmem_rlhf.page.report_data import report_data
from lowmem_rlhf.run.directory import REPORT, RunDirectory


def write_report(run: RunDirectory) -> Path:
    """Write the run's ``report.html`` from what the run has so far, and return its path.

    Secrets in its texts are masked, and this user's home folder is written as ``~``.

    Raises:
        UserError: a log of the run cannot be read.
        RunError: the report cannot be written.
    """
    page, _ = whole_page(report_data(run.path))
    path = run.path / REPORT
    with writing(path, remedy="then write it with `lowmem-rlhf report RUN`"):
        atomic_write(path, page)
    return path
