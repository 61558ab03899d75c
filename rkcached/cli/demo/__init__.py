"""The demo: a manifest and two system prompts worth reading, shipped as package data.

`rkcached demo` copies them into a directory of its own and puts the model's path in place of
`@MODEL@`, so that a visitor can edit a prompt and watch its cache being rebuilt. Nothing else reads
these files.
"""
