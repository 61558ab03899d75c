"""rkcached keeps prompt caches of language models fresh and serves them over a Unix socket."""

__version__ = "0.1.0"
