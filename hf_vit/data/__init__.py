"""From the name of a data set to a batch."""
