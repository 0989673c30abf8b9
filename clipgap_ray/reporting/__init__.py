"""From a finished study to a page: `study` reads, `tables` computes, `figures` draws, `sections` tells, `page` writes.

Tables are lists of records (dicts of plain values), one fact per record, so that a CSV, a parquet file, a figure and
a sentence are made from the same numbers. No Ray here: what is read is per test image, or streamed part by part.
"""
