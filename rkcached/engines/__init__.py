"""Engines: one port (`base`), its implementations, and the table that names them (`registry`)."""
