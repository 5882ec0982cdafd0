"""The report of a run: one HTML file with everything that it needs, written from the files of a compressed folder."""

from optimum_moe.reporting.page.run_record import RunRecord
from optimum_moe.reporting.page.write import PAGE_FILE, refresh_page, write_page

__all__ = ["PAGE_FILE", "RunRecord", "refresh_page", "write_page"]
