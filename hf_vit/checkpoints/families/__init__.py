"""The layouts of weights that are read and written, one module for each."""
