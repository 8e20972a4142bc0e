"""Training: own classifiers and regressions on the features of an installed model, and how good each is.

    examples.py -> splitting.py -> heads.py -> figures.py      examples, split, head, evaluation
                                      |
                                      v
                    provider_image/compiler/heads.py           backbone and head as one artefact

Imports `provider_image` and `store`, and neither server nor batcher: features come from the queue like every other
answer. Fitting needs scikit-learn (extra `train`), imported inside the functions that need it.
"""
