"""The layouts of weights that are read and written, a module each."""
