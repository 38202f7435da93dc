"""Train several heads on one frozen encoder: the steps of `hf-vit train --heads`.

The steps are functions of the modules: `plans.read_plans`, `features.features_of`, `fits.FITS` and `run.train_heads`.
"""
