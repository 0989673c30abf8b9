"""Write the page: one self-contained HTML, every figure as SVG and PNG, every table as CSV and parquet."""

from __future__ import annotations

import csv
import io
import json
import platform
from importlib import metadata
from typing import Any

import jinja2
import pyarrow as pa

from clipgap_ray import __version__, store
from clipgap_ray.reporting.layout import Section
from clipgap_ray.reporting.tables import Record
from clipgap_ray.reporting.theme import data_uri, page_share, render

LIBRARIES = ("ray", "torch", "open_clip_torch", "faiss-cpu", "numpy", "scipy", "statsmodels", "pyarrow", "matplotlib")
LARGEST_BYTES = 20 * 1024 * 1024


def environment() -> jinja2.Environment:
    """Return the templates of this package; everything inserted is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("clipgap_ray.reporting", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def versions() -> dict[str, str]:
    """Return the versions of what made the numbers; libraries that are not installed are left out."""
    found = {"clipgap_ray": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_figures(out: str, sections: list[Section]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Draw every figure of the page once.

    Args:
        out: The report's directory; `figures/<name>.svg` and `.png` are written in it.
        sections: The sections.

    Returns:
        `{name: {"light": data address, "dark": data address, "share": percent of the page's width}}` for the page,
        and sha256 of every file by its path.
    """
    inlined, hashes = {}, {}
    for plot in (plot for section in sections for plot in section.plots):
        files = render(plot.draw)
        for suffix in ("svg", "png"):
            path = f"figures/{plot.name}.{suffix}"
            store.write_bytes(store.join(out, path), files[f"light.{suffix}"])
            hashes[path] = store.sha256(files[f"light.{suffix}"])
        inlined[plot.name] = {theme: data_uri(files[f"{theme}.svg"], "image/svg+xml") for theme in ("light", "dark")}
        inlined[plot.name]["share"] = str(page_share(files["light.svg"]))
    return inlined, hashes


def write_tables(out: str, tables: dict[str, list[Record]], digests: list[Record]) -> dict[str, str]:
    """Write every table as CSV and parquet; empty ones are left out.

    Args:
        out: The report's directory.
        tables: Records by file name.
        digests: What the numbers came from: stored in the parquet files' schema metadata, key `clipgap.digests`.

    Returns:
        sha256 of every file by its path in `out`.
    """
    hashes = {}
    marks = {"clipgap.digests": json.dumps(digests), "clipgap.version": __version__}
    for name, records in tables.items():
        if not records:
            continue
        flat = [{key: value for key, value in record.items() if _is_plain(value)} for record in records]
        columns = dict.fromkeys(key for record in flat for key in record)  # pyarrow takes those of the first record
        table = pa.table({key: [record.get(key) for record in flat] for key in columns}, metadata=marks)
        for suffix, data in (("csv", csv_bytes(flat)), ("parquet", store.table_bytes(table))):
            store.write_bytes(store.join(out, "tables", f"{name}.{suffix}"), data)
            hashes[f"tables/{name}.{suffix}"] = store.sha256(data)
    return hashes


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def csv_bytes(records: list[Record]) -> bytes:
    """Return records as CSV with a header; what a record lacks is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for record in records for key in record)))
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue().encode()


def render_page(template: str, **values: Any) -> str:
    """Fill a template of this package; the page is self-contained."""
    return environment().get_template(template).render(versions=versions(), **values)
