"""Accuracy, calibration, speed and feature quality of a model on labelled images."""
