"""Anthropic's Messages at the edge: translated to the internal request, with answers of their own.

`routes` has the endpoints, which the app takes in beside OpenAI's. Nothing else of the package
knows this folder.
"""
