"""`rkcached init`: finds models and prompts in a folder, and writes a manifest for them.

`folder` looks, `text` words the manifest, `command` asks, writes and says what to do next.
"""
