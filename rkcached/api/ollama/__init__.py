"""Ollama's API at the edge: requests are translated to the internal one, answers are its own.

`routes` has the endpoints, which the app takes in beside OpenAI's. Nothing else of the package
knows this folder.
"""
