"""Coverage-guided fuzzing of every parser: `targets` has them, `run` is the program."""
