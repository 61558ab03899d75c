"""Your files: the manifest and everything that it names.

This room only reads; it never writes to one of them.

`parser` makes a `manifest` of its text. `reader` reads prompts (`patterns` lists them, `text_files`
reads one file) and identifies models; `stored_texts` keeps the prompts that came over the socket.
The plan is made from what it returns; the reconciler and the commands call it.
"""
