"""The demo: a manifest and two system prompts worth reading, shipped as package data.

`workspace` copies them into a directory of its own and puts the facts of the model in place of
`@MODEL@` and its like, so that a visitor can edit a prompt and watch its cache being rebuilt.
`runner` starts the daemon there, and asks. Nothing else reads these files.
"""
