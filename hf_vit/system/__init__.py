"""Disk, network, signals, hardware: what the other packages stand on."""
