"""Choose the best classifier that a data set and a number of minutes allow: the steps of `hf-vit fit`.

The steps are functions of the modules: `embedding.embed`, `heads.fit_head`, `race.race` and `fit.fit`.
"""
