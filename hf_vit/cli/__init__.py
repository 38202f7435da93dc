"""The command `hf-vit`."""
