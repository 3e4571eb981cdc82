"""The benchmark harness, driven by `python -m dispatch bench` and by benchmarks/.

`cases` is the matrix, `contestants` says who runs it and how, `timing` how a call is timed, `harness` turns them into
rows, `results` keeps the rows in a file, `report` makes tables and charts of them. Importing it imports no contestant.
"""
