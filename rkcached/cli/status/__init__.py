"""`rkcached status` and what looks like it: the table, the live view, the picture of one model."""
