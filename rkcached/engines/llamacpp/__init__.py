"""llama.cpp, through the xllamacpp package: any Linux machine, on its CPU."""
