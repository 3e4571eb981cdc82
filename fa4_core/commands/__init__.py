"""The commands of `python -m dispatch`, a module each; `fa4_core.cli` puts them together."""
