"""Averages of models that share a parent: the average itself, the search for its weights, and what warns of a bad one.

Tensors, arrays and score functions only: where weights lie on disk, what a score is and how a model is run is for the
rooms above.
"""
